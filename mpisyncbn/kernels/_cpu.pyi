# Made of cpu.cpp, which is not there where it was not built.
from typing import Any

def __getattr__(name: str) -> Any: ...
