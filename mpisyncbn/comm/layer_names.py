"""Names for layers without one: each is named after the exchange that first used it."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..convert import Synchronized

__all__ = ["FirstUses", "give_up_key", "new_key"]

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[str, Synchronized] = weakref.WeakValueDictionary()
# A compiled backward pass may still ask for the name of a layer that was dropped after forward.
_KEPT = 256


def new_key(layer: Synchronized) -> str:
    """Return a key for ``layer``, for this process only. It begins with ``#``, as no name does."""
    key = f"#{next(_numbers)}"
    _layers[key] = layer
    return key


def give_up_key(layer: Synchronized) -> None:
    """Forget the key of ``layer``, which gets another, or none."""
    key = layer._key
    if _layers.get(key) is layer:
        del _layers[key]


class FirstUses(dict[str, str]):
    """Names of layers by their keys, for one communicator. In time it forgets dropped layers."""

    _room = 2 * _KEPT

    def add(self, key: str, exchange: int) -> str:
        """Name the layer with this key after the exchange that it begins, and return the name."""
        if len(self) >= self._room:
            dropped = [key for key in list(self) if key not in _layers]  # in order of their first use
            for each in dropped[:-_KEPT]:
                self.pop(each, None)
            self._room = 2 * (len(self) + _KEPT)
        name = self[key] = f"the layer first used in exchange number {exchange}"
        return name
