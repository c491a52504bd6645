"""Corrections for samples that older weights made than those an update starts from.

Three policies score such a sample: the behavior policy b that made it, the proximal policy p
that the update starts from, and pi, which the optimizer's steps move. Plain PPO takes b for p,
so that its clip also counts what earlier updates changed. A correction tells them apart:

    loss = -mean over b of w(p / b) min(r A, clip(r) A),    r = pi / p

(Hilton et al. 2021, https://arxiv.org/abs/2110.00641; for asynchronous learners the decoupled
objective of AReaL, https://arxiv.org/abs/2505.24298). The behavior weight w stands for the
importance weight p / b, which moves the mean from b to p, and is a constant to the gradient.
Where b = p, w is 1 and every kind is plain PPO.

The value loss and the entropy bonus are not weighted: the critic's targets are what V-trace
corrects, and the mean divides by all valid samples, so that one that is left out of the policy
loss makes the others no heavier.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxvla.algorithms import losses
from jaxvla.algorithms.base import Metrics
from jaxvla.algorithms.policy import Evaluation
from jaxvla.config import ConfigError, override
from jaxvla.types import TrainingBatch, Trajectory


@dataclass(kw_only=True, slots=True)
class CorrectionConfig:
    """What is done about stale samples."""

    kind: str = "none"
    """Entry of `CORRECTIONS`: none, decoupled, interpolated, truncated, vtrace or gaussian."""
    cap: float = 2.0
    """For decoupled, interpolated and truncated: the largest behavior weight, at least 1. The
    first two leave a sample above it out of the policy loss, truncated counts it with the cap."""
    rho_cap: float = 1.0
    """For vtrace: the largest weight of an error of the critic and of a sample, at least 1."""
    trace_cap: float = 1.0
    """For vtrace: the largest weight of a step that later errors pass, in [1, rho_cap]."""
    sigma: float = 0.5
    """For gaussian: standard deviation of the trust weight, in nats of log p / b."""

    def validate(self, section: str) -> None:
        """Raises ConfigError on a value out of range. `section`: the name of these settings."""
        for name, allowed, holds in (
            ("kind", f"must be one of {', '.join(CORRECTIONS)}", self.kind in CORRECTIONS),
            ("cap", "must be >= 1, the weight of a sample that is not stale", self.cap >= 1.0),
            (
                "rho_cap",
                "must be >= 1, the weight of a sample that is not stale",
                self.rho_cap >= 1.0,
            ),
            (
                "trace_cap",
                f"must be in [1, rho_cap = {self.rho_cap}]",
                1.0 <= self.trace_cap <= self.rho_cap,
            ),
            ("sigma", "must be > 0", self.sigma > 0.0),
        ):
            if not holds:
                fix = override(f"{section}.{name}", getattr(CorrectionConfig(), name))
                raise ConfigError(f"{section}.{name}", getattr(self, name), allowed, fix)


class Proximal(enum.Enum):
    """Where the log-prob of the proximal policy comes from."""

    BEHAVIOR = enum.auto()
    """It is taken to be the policy that acted."""
    RECOMPUTED = enum.auto()
    """The batch is evaluated once more before the update."""
    INTERPOLATED = enum.auto()
    """It is put between that of the policy that acted and that of pi, by their versions."""


Weights = tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]
"""Behavior weights, and which of them a cap changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One kind of correction."""

    proximal: Proximal
    weigh: Callable[[Float[Array, "*shape"], CorrectionConfig], Weights]
    """Behavior weights from log p / b."""
    has_vtrace_targets: bool = False
    """Advantages and returns are V-trace's, of the present critic."""

    @property
    def needs_evaluation(self) -> bool:
        """Whether the batch must be evaluated at the weights that the update starts from."""
        return self.proximal is Proximal.RECOMPUTED

    def split(
        self, log_prob: Float[Array, "*shape"], batch: TrainingBatch
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """(log pi / p, log p / b) of samples; gradients pass through the first alone.

        Interpolated, with s the staleness and so s + 1 updates between b and the end of this one:

            log p = stop_gradient(log b + s / (s + 1) (log pi - log b))

        as RLinf and AReaL have it (https://arxiv.org/abs/2512.06547): no evaluation, but p, a guess
        on a straight line, moves along with pi during the update.
        """
        if self.proximal is not Proximal.INTERPOLATED:
            return (
                log_prob - batch.proximal_log_prob,
                batch.proximal_log_prob - batch.behavior_log_prob,
            )
        moved = log_prob - batch.behavior_log_prob
        share = batch.staleness / (batch.staleness + 1.0)
        before = jax.lax.stop_gradient(share * moved)
        return moved - before, before


def _unit(log_ratio: Float[Array, "*shape"], config: CorrectionConfig) -> Weights:
    """1: the surrogate's own ratio is to b."""
    del config
    return jnp.ones_like(log_ratio), jnp.zeros(log_ratio.shape, bool)


def _masked(log_ratio: Float[Array, "*shape"], config: CorrectionConfig) -> Weights:
    """p / b, and 0 above the cap.

    A ratio far above 1 means that b found the action unlikely, or that the two programs that
    scored it disagree. Such a sample says little about p; with the cap for a weight it would be
    one of the heaviest of the batch all the same.
    """
    is_capped = log_ratio > math.log(config.cap)
    return jnp.where(is_capped, 0.0, jnp.exp(log_ratio)), is_capped


def _truncated(log_ratio: Float[Array, "*shape"], config: CorrectionConfig) -> Weights:
    """min(p / b, cap): Ionides 2008 (https://doi.org/10.1198/106186008X320456).

    Unlike a mask it never silences an action that has become much likelier.
    """
    return _at_most(log_ratio, config.cap)


def _truncated_rho(log_ratio: Float[Array, "*shape"], config: CorrectionConfig) -> Weights:
    """min(p / b, rho_cap), the rho of V-trace's policy gradient (Espeholt et al. 2018, section
    4.2, https://arxiv.org/abs/1802.01561)."""
    return _at_most(log_ratio, config.rho_cap)


def _at_most(log_ratio: Float[Array, "*shape"], cap: float) -> Weights:
    bound = math.log(cap)
    return jnp.exp(jnp.minimum(log_ratio, bound)), log_ratio > bound


def _gaussian(log_ratio: Float[Array, "*shape"], config: CorrectionConfig) -> Weights:
    """p / b times the trust weight exp(-(log p / b)^2 / (2 sigma^2)).

    The smooth weight of AcceRL (https://arxiv.org/abs/2603.18464) and GIPO
    (https://arxiv.org/abs/2603.03955). There it damps pi / b and replaces the clip; here it
    damps p / b, as the clip bounds pi / p already. The product is at most exp(sigma^2 / 2), at
    log p / b = sigma^2, and goes to 0 on both sides.
    """
    weight = jnp.exp(log_ratio - 0.5 * jnp.square(log_ratio / config.sigma))
    return weight, jnp.zeros(log_ratio.shape, bool)


CORRECTIONS = {
    "none": Correction(proximal=Proximal.BEHAVIOR, weigh=_unit),
    "decoupled": Correction(proximal=Proximal.RECOMPUTED, weigh=_masked),
    "interpolated": Correction(proximal=Proximal.INTERPOLATED, weigh=_masked),
    "truncated": Correction(proximal=Proximal.RECOMPUTED, weigh=_truncated),
    "vtrace": Correction(
        proximal=Proximal.RECOMPUTED, weigh=_truncated_rho, has_vtrace_targets=True
    ),
    "gaussian": Correction(proximal=Proximal.RECOMPUTED, weigh=_gaussian),
}
"""By `CorrectionConfig.kind`."""


def at_start_of_update(
    trajectory: Trajectory, staleness: jax.Array, evaluation: Evaluation | None
) -> Evaluation:
    """Log-probs and values [T, B] at the weights that the update starts from.

    Samples that are not stale were made by these weights and keep their numbers of acting time,
    which an evaluation repeats to rounding only. So do those that are not valid: their
    observations may hold NaN.

    Args:
      trajectory: of acting time.
      staleness: int32 [T, B].
      evaluation: of the trajectory at these weights; None where nobody needs it.
    """
    acting = Evaluation(log_prob=trajectory.behavior_log_prob, value=trajectory.value)
    if evaluation is None:
        return acting
    is_moved = trajectory.valid & (staleness > 0)
    return jax.tree.map(lambda new, old: jnp.where(is_moved, new, old), evaluation, acting)


def metrics(
    *,
    log_ratio: Float[Array, "*shape"],
    behavior_weight: Float[Array, "*shape"],
    is_capped: Bool[Array, "*shape"],
    weight: Float[Array, "*shape"],
) -> Metrics:
    """What the correction did to the samples of an optimizer step.

    Args:
      log_ratio: log p / b, 0 for samples of weight 0.
      behavior_weight, is_capped: from `Correction.weigh`.
      weight: `TrainingBatch.weight`.
    """
    return {
        "behavior_weight/mean": losses.weighted_mean(behavior_weight, weight),
        "behavior_weight/max": jnp.max(jnp.where(weight > 0.0, behavior_weight, 0.0)),
        "behavior_weight/capped_fraction": losses.weighted_mean(
            is_capped.astype(jnp.float32), weight
        ),
        # mean^2 / mean_square is the effective sample size (sum w)^2 / sum w^2 per sample: Owen,
        # Monte Carlo theory, methods and examples, section 9.3 (https://artowen.su.domains/mc/).
        "behavior_weight/mean_square": losses.weighted_mean(jnp.square(behavior_weight), weight),
        # E_b[(w - 1) - log w] = KL(b || p), as for PPO's approx_kl.
        "behavior_approx_kl": losses.weighted_mean(jnp.expm1(log_ratio) - log_ratio, weight),
    }
