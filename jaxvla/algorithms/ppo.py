"""Proximal policy optimisation over action chunks.

One action chunk is one decision: one reward (summed over its executed steps), one value,
one advantage and one log-prob.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxvla.algorithms import losses, returns
from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.policy import TrainablePolicy
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
    value_clip: float = 0.2
    """Trust region of the critic, in units of value."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    standardize_advantages: bool = True
    """Advantages are standardised over the whole batch of an update."""

    def validate(self) -> None:
        """Raises ConfigError on a value out of range."""
        for name, allowed, holds in (
            ("discount", "must be in [0, 1]", 0.0 <= self.discount <= 1.0),
            ("trace_decay", "must be in [0, 1]", 0.0 <= self.trace_decay <= 1.0),
            ("clip_low", "must be > 0", self.clip_low > 0.0),
            ("clip_high", "must be > 0", self.clip_high > 0.0),
            ("value_clip", "must be > 0", self.value_clip > 0.0),
            ("value_coef", "must be >= 0", self.value_coef >= 0.0),
            ("entropy_coef", "must be >= 0", self.entropy_coef >= 0.0),
        ):
            if not holds:
                fix = override(f"algorithm.{name}", getattr(PPOConfig(), name))
                raise ConfigError(f"algorithm.{name}", getattr(self, name), allowed, fix)

    def reads_final_values(self) -> bool:
        """Not when a time limit counts as a failure."""
        return self.bootstrap_truncated

    def whole_batch_settings(self) -> tuple[str, ...]:
        """Switches, now on, that need statistics of the whole batch of an update."""
        return ("standardize_advantages",) if self.standardize_advantages else ()


class PPO:
    """Implements `jaxvla.algorithms.base.Algorithm`."""

    def __init__(self, config: PPOConfig):
        self.config = config

    def prepare(self, trajectory: Trajectory) -> TrainingBatch:
        """Advantages by GAE and returns A + V; see `Algorithm.prepare`."""
        terminated = trajectory.terminated
        if not self.config.bootstrap_truncated:
            terminated |= trajectory.truncated
        advantage = returns.generalized_advantages(
            reward=trajectory.reward,
            value=trajectory.value,
            bootstrap_value=trajectory.bootstrap_value,
            terminated=terminated,
            truncated=trajectory.truncated,
            valid=trajectory.valid,
            discount=self.config.discount,
            trace_decay=self.config.trace_decay,
        )
        return_ = advantage + trajectory.value
        weight = trajectory.valid.astype(jnp.float32)
        if self.config.standardize_advantages:
            advantage = returns.standardize(advantage, weight)
        batch = TrainingBatch(
            observation=trajectory.observation,
            trace=trajectory.trace,
            behavior_log_prob=trajectory.behavior_log_prob,
            behavior_value=trajectory.value,
            advantage=advantage,
            return_=return_,
            weight=weight,
        )
        return losses.blank_unused(batch, weight)

    def loss(
        self, policy: TrainablePolicy, params: Params, batch: TrainingBatch
    ) -> tuple[jax.Array, Metrics]:
        """Clipped surrogate + value loss - entropy bonus; see `Algorithm.loss`."""
        config = self.config
        log_prob, entropy, value = policy.evaluate(params, batch.observation, batch.trace)
        log_ratio = jnp.where(batch.weight > 0.0, log_prob - batch.behavior_log_prob, 0.0)
        ratio = jnp.exp(log_ratio)
        policy_loss = losses.weighted_mean(
            losses.clipped_surrogate(
                ratio, batch.advantage, clip_low=config.clip_low, clip_high=config.clip_high
            ),
            batch.weight,
        )
        value_loss = losses.weighted_mean(
            losses.clipped_value_error(
                value, batch.behavior_value, batch.return_, clip=config.value_clip
            ),
            batch.weight,
        )
        entropy_mean = losses.weighted_mean(entropy, batch.weight)
        total = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy_mean
        is_clipped = (ratio < 1.0 - config.clip_low) | (ratio > 1.0 + config.clip_high)
        return total, {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "loss/entropy": entropy_mean,
            "loss/total": total,
            "ratio/mean": losses.weighted_mean(ratio, batch.weight),
            "ratio/max": jnp.max(ratio * batch.weight),
            "clip_fraction": losses.weighted_mean(is_clipped.astype(jnp.float32), batch.weight),
            # E[(r - 1) - log r], the low-variance estimator of KL(behavior || policy)
            # (http://joschu.net/blog/kl-approx.html). As expm1, for r - 1 rounds small ones off.
            "approx_kl": losses.weighted_mean(jnp.expm1(log_ratio) - log_ratio, batch.weight),
        }
