"""What a process of the run is told when it is started, as JSON. No jax."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

LEARNER, SERVER, SIMULATOR = "learner", "server", "simulator"
REPLICA_ROLES = {LEARNER: "learning", SERVER: "serving", SIMULATOR: "simulation"}
"""Kind of replica -> role of its program."""


def resource_field(kind: str, index: int) -> str:
    """Field of the runtime's config that says what a process gets."""
    return f"{'follower' if kind == LEARNER and index else kind}_resources"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """One process for one program."""

    kind: str
    """A key of REPLICA_ROLES."""
    index: int
    """Among those of its kind."""
    launch: int
    """How often it was started before."""
    control: tuple[str, int]
    """Where the supervisor listens."""
    token: str
    """Of all connections of the run, hex."""
    host: str
    """What to listen on."""
    workdir: str
    command: str
    """The command line that continues the run."""
    config: dict[str, Any]
    """`jaxvla.config_data`."""

    @property
    def name(self) -> str:
        """Such as "simulator_0"."""
        return f"{self.kind}_{self.index}"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ReplicaSpec":
        """Of `to_json`.

        Raises:
          ValueError: it is something else.
        """
        data = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or data.keys() != names or data["kind"] not in REPLICA_ROLES:
            raise ValueError("this is no spec of a replica")
        host, port = data["control"]
        return cls(**{**data, "control": (str(host), int(port))})
