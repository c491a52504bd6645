"""The policy loss that PPO and GRPO share: a clipped surrogate, corrected for staleness."""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from jaxvla.algorithms import corrections, losses
from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.corrections import CORRECTIONS, CorrectionConfig, Proximal
from jaxvla.algorithms.policy import Evaluation
from jaxvla.types import TrainingBatch, Trajectory


class SurrogateConfig(Protocol):
    """What it reads of an algorithm's config."""

    clip_low: float
    clip_high: float
    dual_clip: float
    correction: CorrectionConfig


def clip_checks(config: SurrogateConfig) -> tuple[tuple[str, str, bool], ...]:
    """(setting, what is allowed, whether it holds) of the bounds of the ratio."""
    dual_clip, least = config.dual_clip, 1.0 + config.clip_high
    return (
        ("clip_low", "must be > 0", config.clip_low > 0.0),
        ("clip_high", "must be > 0", config.clip_high > 0.0),
        (
            "dual_clip",
            f"must be 0 or > 1 + clip_high = {least:g}",
            dual_clip == 0.0 or dual_clip > least,
        ),
    )


@flax.struct.dataclass(kw_only=True)
class Start:
    """Where an update starts from, as samples [T, B] see it."""

    staleness: jax.Array
    """int32, see `TrainingBatch.staleness`."""
    proximal_log_prob: jax.Array
    """float32, see `TrainingBatch.proximal_log_prob`."""
    value: jax.Array
    """float32, present where the batch was evaluated for it, else that of acting time."""


class Surrogate:
    """Policy loss of one algorithm's settings."""

    def __init__(self, config: SurrogateConfig):
        self.correction = CORRECTIONS[config.correction.kind]
        self._config = config

    def start(
        self, trajectory: Trajectory, version: jax.Array, evaluation: Evaluation | None
    ) -> Start:
        """Args: as for `Algorithm.prepare`."""
        staleness = jnp.maximum(version - trajectory.policy_version, 0)
        present = corrections.at_start_of_update(trajectory, staleness, evaluation)
        is_recomputed = self.correction.proximal is Proximal.RECOMPUTED
        return Start(
            staleness=staleness,
            proximal_log_prob=(present.log_prob if is_recomputed else trajectory.behavior_log_prob),
            value=present.value,
        )

    def loss(self, log_prob: jax.Array, batch: TrainingBatch) -> tuple[jax.Array, Metrics]:
        """Mean over the weights of samples [N], and metrics.

        Args:
          log_prob: float32 [N], of the weights that are trained; arbitrary at weight 0.
          batch: samples.
        """
        config, is_used = self._config, batch.weight > 0.0
        log_ratio, before = (
            jnp.where(is_used, x, 0.0) for x in self.correction.split(log_prob, batch)
        )
        ratio = jnp.exp(log_ratio)
        behavior_weight, is_capped = self.correction.weigh(before, config.correction)
        surrogate = losses.clipped_surrogate(
            ratio,
            batch.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        loss = losses.weighted_mean(behavior_weight * surrogate, batch.weight)
        is_clipped = (ratio < 1.0 - config.clip_low) | (ratio > 1.0 + config.clip_high)
        metrics = {
            "loss/policy": loss,
            "ratio/mean": losses.weighted_mean(ratio, batch.weight),
            "ratio/max": jnp.max(jnp.where(is_used, ratio, 0.0)),
            "clip_fraction": losses.weighted_mean(is_clipped.astype(jnp.float32), batch.weight),
            # E[(r - 1) - log r], the low-variance estimator of KL(proximal || policy)
            # (http://joschu.net/blog/kl-approx.html). As expm1, for r - 1 rounds small ones off.
            "approx_kl": losses.weighted_mean(jnp.expm1(log_ratio) - log_ratio, batch.weight),
        }
        if self.correction.proximal is Proximal.BEHAVIOR:
            return loss, metrics
        return loss, metrics | corrections.metrics(
            log_ratio=before,
            behavior_weight=behavior_weight,
            is_capped=is_capped,
            weight=batch.weight,
        )
