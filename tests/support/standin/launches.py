"""Run Triton's interpreted kernels on the stand-in's device memory itself, in stream order.

Importing this changes Triton's interpreter, which would copy every argument to the host and back.
"""

from __future__ import annotations

import threading

from triton.runtime import interpreter

_on_host_memory = interpreter.GridExecutor.__call__
_one_at_a_time = threading.Lock()  # the interpreter's state is global


def launch(self: object, *arguments: object, **options: object) -> None:
    from operations import down, in_stream_order

    arguments = tuple(map(down, arguments))
    options = {name: down(value) for name, value in options.items()}

    def run() -> None:
        with _one_at_a_time:
            _on_host_memory(self, *arguments, **options)

    in_stream_order(run)


interpreter.GridExecutor.__call__ = launch
