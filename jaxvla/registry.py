"""Name -> "module:attribute" tables, resolved lazily. No jax here."""

import difflib
import importlib
import re
from collections.abc import Iterator
from typing import Any


def nearest(name: str, known: list[str]) -> str:
    """Returns a hint such as " (did you mean 'reach'?)", or "" when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry:
    """A table of plug-ins of one kind.

    Entries are strings, so that importing the table imports no plug-in. An
    out-of-tree plug-in needs no entry: name it "package.module:Attribute".
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or (isinstance(name, str) and ":" in name)

    def get(self, name: str) -> Any:
        """Imports and returns the attribute behind `name`.

        Raises:
          ValueError: the name is unknown (the message lists the known ones), or what it names
            cannot be imported.
        """
        target = name if ":" in name else self._entries.get(name)
        if target is None:
            known = sorted(self._entries)
            raise ValueError(
                f"unknown {self.kind} {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", target):
            raise ValueError(f"{self.kind} {name!r} is not of the form package.module:Attribute")
        module_name, _, attribute = target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"{self.kind} {name!r} cannot be imported: {error}") from error
        if not hasattr(module, attribute):
            raise ValueError(f"{self.kind} {name!r}: {module_name} has no {attribute}")
        return getattr(module, attribute)
