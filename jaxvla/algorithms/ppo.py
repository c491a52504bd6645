"""Proximal policy optimisation over action chunks.

One action chunk is one decision: one reward (summed over its executed steps), one value,
one advantage and one log-prob.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxvla.algorithms import losses, returns
from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.corrections import CorrectionConfig
from jaxvla.algorithms.policy import Evaluation, TrainablePolicy
from jaxvla.algorithms.surrogate import Surrogate, clip_checks
from jaxvla.config import AlgorithmConfig, ConfigError, override
from jaxvla.types import Params, TrainingBatch, Trajectory


@dataclass(kw_only=True, slots=True)
class PPOConfig(AlgorithmConfig):
    """Hyper-parameters of PPO."""

    name: str = "ppo"
    discount: float = 0.99
    """gamma per chunk, in [0, 1]."""
    trace_decay: float = 0.95
    """lambda of the advantage estimator, in [0, 1]."""
    bootstrap_truncated: bool = True
    """An episode cut by its time limit is worth what the critic makes of its last observation
    (right when the limit is not part of the task); off: nothing more, as if it had failed."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Ratio beyond which an action of negative advantage pulls no more, above 1 + clip_high;
    0: none. Published runs use 3."""
    value_clip: float = 0.2
    """Trust region of the critic, in units of value."""
    value_huber: float = 0.0
    """Error of the critic beyond which its loss grows linearly, in units of value; 0: the loss is
    squared throughout. Published runs use 10."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    standardize_advantages: bool = True
    """Advantages are standardised over the whole batch of an update."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """For samples of older weights than those that the update starts from."""
    recompute_value: bool = False
    """Targets are made with the critic that the update starts from, not with that of acting
    time; vtrace always does. Only `Trajectory.bootstrap_value` stays that of acting time: the
    observations it belongs to are not in the trajectory."""

    def validate(self) -> None:
        """Raises ConfigError on a value out of range."""
        for name, allowed, holds in (
            ("discount", "must be in [0, 1]", 0.0 <= self.discount <= 1.0),
            ("trace_decay", "must be in [0, 1]", 0.0 <= self.trace_decay <= 1.0),
            *clip_checks(self),
            ("value_clip", "must be > 0", self.value_clip > 0.0),
            ("value_huber", "must be >= 0", self.value_huber >= 0.0),
            ("value_coef", "must be >= 0", self.value_coef >= 0.0),
            ("entropy_coef", "must be >= 0", self.entropy_coef >= 0.0),
        ):
            if not holds:
                fix = override(f"algorithm.{name}", getattr(PPOConfig(), name))
                raise ConfigError(f"algorithm.{name}", getattr(self, name), allowed, fix)
        self.correction.validate("algorithm.correction")

    def reads_final_values(self) -> bool:
        """Not when a time limit counts as a failure."""
        return self.bootstrap_truncated


class PPO:
    """Implements `jaxvla.algorithms.base.Algorithm`."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self._surrogate = Surrogate(config)
        self._correction = self._surrogate.correction
        self._uses_present_value = config.recompute_value or self._correction.has_vtrace_targets

    @property
    def needs_evaluation(self) -> bool:
        """See `Algorithm.needs_evaluation`."""
        return self._correction.needs_evaluation or self._uses_present_value

    @property
    def standardizes_advantages(self) -> bool:
        """See `Algorithm.standardizes_advantages`."""
        return self.config.standardize_advantages

    def prepare(
        self, trajectory: Trajectory, *, version: jax.Array, evaluation: Evaluation | None
    ) -> TrainingBatch:
        """Advantages and returns by GAE or V-trace; see `Algorithm.prepare`."""
        start = self._surrogate.start(trajectory, version, evaluation)
        log_prob = start.proximal_log_prob
        value = start.value if self._uses_present_value else trajectory.value
        advantage, return_ = self._targets(trajectory, log_prob, value)
        weight = trajectory.valid.astype(jnp.float32)
        batch = TrainingBatch(
            observation=trajectory.observation,
            trace=trajectory.trace,
            behavior_log_prob=trajectory.behavior_log_prob,
            proximal_log_prob=log_prob,
            proximal_value=value,
            staleness=start.staleness,
            advantage=advantage,
            return_=return_,
            weight=weight,
        )
        return losses.blank_unused(batch, weight)

    def _targets(
        self, trajectory: Trajectory, log_prob: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(advantage, return) [T, B], given log-probs and values of the present weights."""
        config, terminated = self.config, trajectory.terminated
        if not config.bootstrap_truncated:
            terminated |= trajectory.truncated
        outcomes: dict[str, Any] = {
            "reward": trajectory.reward,
            "value": value,
            "bootstrap_value": trajectory.bootstrap_value,
            "terminated": terminated,
            "truncated": trajectory.truncated,
            "valid": trajectory.valid,
            "discount": config.discount,
            "trace_decay": config.trace_decay,
        }
        if self._correction.has_vtrace_targets:
            return returns.vtrace(
                **outcomes,
                log_ratio=log_prob - trajectory.behavior_log_prob,
                rho_cap=config.correction.rho_cap,
                trace_cap=config.correction.trace_cap,
            )
        advantage = returns.generalized_advantages(**outcomes)
        return advantage, advantage + value

    def loss(
        self, policy: TrainablePolicy, params: Params, batch: TrainingBatch
    ) -> tuple[jax.Array, Metrics]:
        """Clipped surrogate + value loss - entropy bonus; see `Algorithm.loss`."""
        config = self.config
        log_prob, entropy, value = policy.evaluate(params, batch.observation, batch.trace)
        policy_loss, metrics = self._surrogate.loss(log_prob, batch)
        value_loss = losses.weighted_mean(
            losses.clipped_value_error(
                value,
                batch.proximal_value,
                batch.return_,
                clip=config.value_clip,
                huber=config.value_huber,
            ),
            batch.weight,
        )
        entropy_mean = losses.weighted_mean(entropy, batch.weight)
        total = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy_mean
        return total, metrics | {
            "loss/value": value_loss,
            "loss/entropy": entropy_mean,
            "loss/total": total,
        }
