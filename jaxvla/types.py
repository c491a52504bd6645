"""Values that cross module boundaries.

Shape letters: T chunk steps, B batch, E envs, C cameras, h/w pixels, S state dim,
N tokens, H action horizon, A action dim. `...` stands for any leading axes.
Device values are flax.struct dataclasses; host values are plain dataclasses.
"""

from dataclasses import dataclass
from typing import Any, cast

import flax.struct
import jax
import numpy as np

Params = dict[str, Any]
"""Nested dict of arrays."""

AnyArray = jax.Array | np.ndarray
"""What env groups on devices and env groups of host processes both make."""


def stand_in(x: np.ndarray | jax.ShapeDtypeStruct) -> jax.Array:
    """`x` itself, typed as the device array in whose place it stands.

    Records below hold numpy arrays on the host and ShapeDtypeStructs where only shapes count.
    """
    return cast(jax.Array, x)


@flax.struct.dataclass(kw_only=True)
class Observation:
    """What a policy reads at a chunk border, in raw (unnormalised) units."""

    images: jax.Array
    """uint8 [..., C, h, w, 3], RGB, row 0 at the top."""
    image_mask: jax.Array
    """bool [..., C], False where a camera is missing."""
    state: jax.Array
    """float32 [..., S], proprioception in the env's own units."""
    tokens: jax.Array
    """int32 [..., N], tokenised instruction, padded."""
    token_mask: jax.Array
    """bool [..., N], True where `tokens` holds a token."""


@flax.struct.dataclass(kw_only=True)
class EnvObservation:
    """What an env shows at a chunk border. The env group turns it into an Observation."""

    images: jax.Array
    """uint8 [..., C, h, w, 3]."""
    state: jax.Array
    """float32 [..., S]."""
    instruction: jax.Array
    """int32 [...], index into `EnvSpec.instructions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvSpec:
    """Static description of an environment."""

    cameras: tuple[str, ...]
    """Names in the order of the C axis."""
    image_size: int
    """Pixels, images are square."""
    state_dim: int
    state_low: tuple[float, ...]
    """Lower bound per state dimension, in its unit; what normalisation maps to -1."""
    state_high: tuple[float, ...]
    """Upper bound per state dimension; what normalisation maps to +1."""
    action_dim: int
    action_names: tuple[str, ...]
    """One name per action dimension; actions are in [-1, 1]."""
    tasks: tuple[str, ...]
    """Task names, index = task id."""
    instructions: tuple[str, ...]
    """Every sentence an episode may carry, index = instruction id."""
    max_episode_steps: tuple[int, ...]
    """Time limit per task, in control steps."""
    control_hz: float


@flax.struct.dataclass(kw_only=True)
class ChunkResult:
    """Outcome of running one action chunk in every env of a group."""

    observation: Observation
    """[E], what the policy reads next: after the auto-reset of finished episodes, or of envs that
    stand still (`simulation.group_size`) their last one."""
    final_observation: Observation | None
    """[E], before the reset; valid only where `truncated`. None when nobody reads it."""
    reward: AnyArray
    """float32 [E], summed over the executed steps of the chunk."""
    terminated: AnyArray
    """bool [E], the episode ended by success or failure inside the chunk."""
    truncated: AnyArray
    """bool [E], the episode ended by its time limit (never together with terminated)."""
    success: AnyArray
    """bool [E], the episode that ended was a success."""
    num_steps: AnyArray
    """int32 [E], control steps executed in this chunk; 0 where the env stood still, as its episode
    had ended before, or failed."""
    episode_return: AnyArray
    """float32 [E], undiscounted return so far, of the episode this chunk belongs to."""
    episode_steps: AnyArray
    """int32 [E], control steps so far, of the episode this chunk belongs to."""
    task: AnyArray
    """int32 [E], task id of the episode this chunk belongs to."""
    invalid: AnyArray
    """bool [E], the world went non-finite or its process died: not to be trained on."""
    contact_overflow: AnyArray
    """int32 [E], contacts of this chunk that exceeded the physics' fixed buffers."""


@flax.struct.dataclass(kw_only=True)
class SupervisedBatch:
    """Labelled observations. Leading axis B; a label that is None is not trained on."""

    observation: Observation
    actions: jax.Array | None
    """float32 [B, H, A], the actions that followed, in the env's units."""
    target_mask: jax.Array | None
    """bool [B, C, h, w], pixels of the object that the instruction names."""


@flax.struct.dataclass(kw_only=True)
class PolicySample:
    """One inference result. Leading axis B unless stated."""

    actions: jax.Array
    """float32 [B, H, A], in the env's units."""
    trace: Any
    """Pytree with leading axis B: what `Policy.log_prob` needs to score the sample."""
    log_prob: jax.Array
    """float32 [B], of the chunk under the weights that made it."""
    value: jax.Array
    """float32 [B]."""


@flax.struct.dataclass(kw_only=True)
class Trajectory:
    """Fixed-length record of one env group, the unit of the queue.

    Time-major [T, B] with T chunk queries and B = E envs. Episodes may end and begin anywhere
    inside it. With `simulation.group_size` they all begin with it and none follows: what comes
    after the end of an episode is not valid, and every number of it is finite.
    """

    observation: Observation
    """[T, B, ...], read by the policy before it acted."""
    trace: Any
    """[T, B, ...], see `PolicySample.trace`."""
    behavior_log_prob: jax.Array
    """float32 [T, B]."""
    value: jax.Array
    """float32 [T, B], critic at acting time."""
    reward: jax.Array
    """float32 [T, B]."""
    terminated: jax.Array
    """bool [T, B]."""
    truncated: jax.Array
    """bool [T, B]."""
    bootstrap_value: jax.Array
    """float32 [T, B], value of the observation that followed; read only at truncated steps and
    at the last step T-1."""
    valid: jax.Array
    """bool [T, B], False where the sample must not be trained on."""
    policy_version: AnyArray
    """int32 [T, B], weights that made the sample."""


@flax.struct.dataclass(kw_only=True)
class TrainingBatch:
    """What a loss reads: samples with their targets, all [T, B, ...] or flattened [N, ...]."""

    observation: Any
    """Observation as `Algorithm.prepare` returns it, its encoding (`Policy.encode`) as
    `Algorithm.loss` reads it."""
    trace: Any
    behavior_log_prob: jax.Array
    """float32, of the weights that acted."""
    proximal_log_prob: jax.Array
    """float32, of the weights that ratios are taken to: those that the update starts from, or
    those that acted where no correction asks for the difference."""
    proximal_value: jax.Array
    """float32, the critic that the targets are made with and V is kept close to: at acting time
    or at the start of the update."""
    staleness: jax.Array
    """int32, updates between the weights that acted and those that the update starts from."""
    advantage: jax.Array
    """float32."""
    return_: jax.Array
    """float32, target of the critic."""
    weight: jax.Array
    """float32, 0 for samples that must not count, else their share in the mean that the loss is:
    1, where samples count alike."""
