"""Group-relative policy optimisation over action chunks.

G episodes begin alike, and what an episode is worth is what sets it apart from the others:

    A_i = (R_i - mean R) / (std R + epsilon)

(Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300), the same for every chunk that
the policy chose in it. No critic is read or trained. The surrogate and its corrections for stale
samples are PPO's; there is no penalty on the distance from a reference policy.
"""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxvla.algorithms import losses, returns
from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.corrections import CORRECTIONS, CorrectionConfig
from jaxvla.algorithms.policy import Evaluation, TrainablePolicy
from jaxvla.algorithms.surrogate import Surrogate, clip_checks
from jaxvla.config import AlgorithmConfig, ConfigError, override
from jaxvla.types import Params, TrainingBatch, Trajectory

_AGGREGATIONS = ("sample", "episode")


@dataclass(kw_only=True, slots=True)
class GRPOConfig(AlgorithmConfig):
    """Hyper-parameters of GRPO. It needs `simulation.group_size` >= 2."""

    name: str = "grpo"
    group_size: int = -1
    """Episodes G that began alike; -1, or the same number again: simulation.group_size."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high; larger than clip_low in DAPO
    (https://arxiv.org/abs/2503.14476), so that unlikely actions can become likely."""
    dual_clip: float = 0.0
    """Ratio beyond which an action of negative advantage pulls no more, above 1 + clip_high;
    0: none. Published runs use 3."""
    normalize_std: bool = True
    """Advantages are divided by the standard deviation of the group's returns. Off as in Dr. GRPO
    (https://arxiv.org/abs/2503.20783): groups that nearly always or nearly never succeed then
    weigh less than others."""
    epsilon: float = 1e-6
    """Added to that standard deviation."""
    filter_uniform: bool = False
    """Groups whose episodes all have the same return are left out of the loss, as in DAPO, instead
    of making the mean smaller with advantages of 0. They are not replaced by others: the batch
    gets smaller. How many there are is the metric "train/uniform_group_fraction"."""
    aggregation: str = "sample"
    """What counts alike in the loss: "sample", every chunk (DAPO), or "episode", every episode,
    however many chunks it has (Shao et al. 2024). Alike within a minibatch: each one is divided
    by the weights that it drew itself."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """For samples of older weights than those that the update starts from; not vtrace, which
    corrects a critic."""

    def validate(self) -> None:
        """Raises ConfigError on a value out of range."""
        for name, allowed, holds in (
            ("group_size", "must be -1 or >= 2", self.group_size == -1 or self.group_size >= 2),
            *clip_checks(self),
            ("epsilon", "must be > 0", self.epsilon > 0.0),
            (
                "aggregation",
                f"must be {' or '.join(_AGGREGATIONS)}",
                self.aggregation in _AGGREGATIONS,
            ),
            ("entropy_coef", "must be >= 0", self.entropy_coef >= 0.0),
        ):
            if not holds:
                fix = override(f"algorithm.{name}", getattr(GRPOConfig(), name))
                raise ConfigError(f"algorithm.{name}", getattr(self, name), allowed, fix)
        self.correction.validate("algorithm.correction")
        if CORRECTIONS[self.correction.kind].has_vtrace_targets:
            raise ConfigError(
                "algorithm.correction.kind",
                self.correction.kind,
                "corrects a critic, which grpo has not",
                override("algorithm.correction.kind", "truncated"),
            )

    def resolve(self, *, group_size: int) -> "GRPOConfig":
        """A copy that knows its group size.

        Raises:
          ConfigError: it was given another one.
        """
        if self.group_size not in (-1, group_size):
            raise ConfigError(
                "algorithm.group_size",
                self.group_size,
                f"must be -1 or simulation.group_size = {group_size}",
                override("algorithm.group_size", -1),
            )
        return dataclasses.replace(self, group_size=group_size)

    def compares_episodes(self) -> bool:
        """Always."""
        return True

    def reads_final_values(self) -> bool:
        """Never: nor any others."""
        return False


class GRPO:
    """Implements `jaxvla.algorithms.base.Algorithm`, for trajectories of whole episodes."""

    standardizes_advantages = False
    """Its statistics are those of groups."""

    def __init__(self, config: GRPOConfig):
        """Args: resolved settings.

        Raises:
          ValueError: they name no group size.
        """
        if config.group_size < 2:
            raise ValueError(f"algorithm.group_size = {config.group_size}: resolve the config")
        self.config = config
        self._surrogate = Surrogate(config)

    @property
    def needs_evaluation(self) -> bool:
        """See `Algorithm.needs_evaluation`."""
        return self._surrogate.correction.needs_evaluation

    def prepare(
        self, trajectory: Trajectory, *, version: jax.Array, evaluation: Evaluation | None
    ) -> TrainingBatch:
        """Advantages within groups; see `Algorithm.prepare`.

        Every column of the [T, B] samples is one episode; columns iG to iG + G - 1 began alike.
        An episode without an end, whose env failed, has no return: none of its samples counts,
        nor does it in its group.
        """
        config = self.config
        start = self._surrogate.start(trajectory, version, evaluation)
        valid = trajectory.valid
        has_return = (valid & (trajectory.terminated | trajectory.truncated)).any(axis=0)
        return_ = jnp.where(valid, trajectory.reward, 0.0).sum(axis=0)
        advantage, is_uniform = returns.group_advantages(
            return_,
            has_return,
            group_size=config.group_size,
            epsilon=config.epsilon if config.normalize_std else None,
        )
        counts = has_return & ~is_uniform if config.filter_uniform else has_return
        weight = (valid & counts).astype(jnp.float32)
        if config.aggregation == "episode":
            weight /= jnp.maximum(valid.sum(axis=0), 1)
        batch = TrainingBatch(
            observation=trajectory.observation,
            trace=trajectory.trace,
            behavior_log_prob=trajectory.behavior_log_prob,
            proximal_log_prob=start.proximal_log_prob,
            proximal_value=trajectory.value,
            staleness=start.staleness,
            advantage=jnp.broadcast_to(advantage, valid.shape),
            return_=jnp.broadcast_to(return_, valid.shape),
            weight=weight,
        )
        return losses.blank_unused(batch, weight)

    def loss(
        self, policy: TrainablePolicy, params: Params, batch: TrainingBatch
    ) -> tuple[jax.Array, Metrics]:
        """Clipped surrogate - entropy bonus; see `Algorithm.loss`."""
        log_prob, entropy, _ = policy.evaluate(params, batch.observation, batch.trace)
        policy_loss, metrics = self._surrogate.loss(log_prob, batch)
        entropy_mean = losses.weighted_mean(entropy, batch.weight)
        total = policy_loss - self.config.entropy_coef * entropy_mean
        return total, metrics | {"loss/entropy": entropy_mean, "loss/total": total}
