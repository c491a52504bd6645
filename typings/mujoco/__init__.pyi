# MuJoCo's Python package carries no type information: its names come from extension modules.
from typing import Any

def __getattr__(name: str) -> Any: ...
