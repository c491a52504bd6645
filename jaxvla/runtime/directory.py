"""Who can be reached where: what the supervisor knows and tells every process. No jax."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Directory:
    """A state of the run; every change is told as a whole."""

    session: str = ""
    """Of the learner that runs, empty while there is none."""
    learner: Address | None = None
    gang: Address | None = None
    """Where the learner's first process waits for its others, if it has some."""
    servers: Mapping[int, Address] = field(default_factory=dict)
    """Policy servers that have weights of this session, by index."""
    given_up: frozenset[int] = frozenset()
    """Policy servers that will not come back."""

    def fields(self) -> dict[str, Any]:
        """For a frame."""
        return {
            "session": self.session,
            "learner": list(self.learner) if self.learner else None,
            "gang": list(self.gang) if self.gang else None,
            "servers": {str(index): list(address) for index, address in self.servers.items()},
            "given_up": sorted(self.given_up),
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Directory":
        """Of `fields`."""
        return cls(
            session=fields["session"],
            learner=_address(fields["learner"]) if fields["learner"] else None,
            gang=_address(fields["gang"]) if fields["gang"] else None,
            servers={int(index): _address(value) for index, value in fields["servers"].items()},
            given_up=frozenset(fields["given_up"]),
        )


def _address(value: Any) -> Address:
    host, port = value
    return str(host), int(port)
