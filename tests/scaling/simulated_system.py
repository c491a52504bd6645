"""Small systems and exact costs for tests of the simulation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvla.config import ScheduleConfig
from jaxvla.scaling.measurements import StageSamples
from jaxvla.scaling.system import System

NOTHING = np.zeros(1)


def one(*seconds: float) -> np.ndarray:
    """Samples that are listed."""
    return np.asarray(seconds, np.float64)


def costs(*, num_chunks: int = 1, num_values: int = 0, **changes: Any) -> StageSamples:
    """Nothing takes time but for what is changed; one env step per query."""
    values: dict[str, Any] = {
        "chunk_s": {1: NOTHING},
        "begin_s": NOTHING,
        "finish_s": NOTHING,
        "service_s": {1: NOTHING},
        "value_s": {1: NOTHING},
        "after_s": NOTHING,
        "answer_s": NOTHING,
        "swap_s": NOTHING,
        "train_s": {1: NOTHING},
        "gradient_s": {},
        "publish_s": NOTHING,
        "between_s": NOTHING,
        "num_chunks": one(num_chunks),
        "num_values": one(num_values),
        "env_steps_per_query": one(1.0),
        "weight_bytes": 0,
        "cores": {},
        "overlap": 0.0,
    }
    return StageSamples(**values | changes)


def schedule(**changes: Any) -> ScheduleConfig:
    """Everything on, S = 1."""
    return ScheduleConfig(**{"max_staleness": 1} | changes)


def system(num_groups: int, *, devices: Sequence[str] | None = None, **changes: Any) -> System:
    """Groups of one env on devices of their own, one server on a device, a learner on another."""
    names = devices or [f"simulation_{index}" for index in range(num_groups)]
    values: dict[str, Any] = {
        "group_devices": tuple((name,) for name in names),
        "server_devices": (("serving",),),
        "learner_devices": ("learning",),
        "envs_per_group": 1,
        "segment_length": 1,
        "assignment": (0,) * num_groups,
        "buckets": (1,),
        "trigger_rows": 1,
        "max_wait_s": 0.0,
        "max_batch": 1,
        "schedule": schedule(),
        "trajectories_per_update": 1,
        "num_warmup": 1,
        "num_updates": 5,
        "is_endless": True,
    }
    return System(**values | changes)
