"""An emulated run (`scaling.emulated_run`) as a system to simulate: the same costs and rules."""

import math

import numpy as np

from jaxvla.scaling.emulated_run import RunPlan
from jaxvla.scaling.emulation import AffineCost
from jaxvla.scaling.measurements import Samples, StageSamples
from jaxvla.scaling.system import System

_NUM_DRAWS = 1000
"""Samples of a stage whose length varies."""


def system_of_plan(plan: RunPlan) -> System:
    """The programs of a plan."""
    batching, envs, placement = plan.batching, plan.envs_per_group, plan.placement
    rows, workload = plan.num_groups * envs, plan.workload
    return System(
        group_devices=((placement.simulation,),) * plan.num_groups,
        server_devices=((placement.inference,),),
        learner_devices=(placement.training,),
        envs_per_group=envs,
        segment_length=workload.segment_length,
        assignment=(0,) * plan.num_groups,
        buckets=tuple(range(envs, rows + 1, envs)),
        trigger_rows=batching.trigger_groups * envs,
        max_wait_s=batching.max_wait_s,
        max_batch=rows,
        is_adaptive=batching.is_adaptive,
        schedule=plan.schedule,
        trajectories_per_update=plan.trajectories_per_update,
        num_warmup=plan.num_warmup,
        num_updates=plan.last_update,
        is_endless=True,
        num_train_pieces=workload.num_update_epochs * workload.num_minibatches,
    )


def samples_of_plan(plan: RunPlan) -> StageSamples:
    """The costs of a plan: samples of the log-normal lengths, or their means where they do not
    vary. Everything else takes no time."""
    workload, costs, envs = plan.workload, plan.costs, plan.envs_per_group
    rows = plan.num_groups * envs
    whole_s = costs.simulation_s / workload.num_chunk_steps
    chunk = AffineCost.of(whole_s, plan.num_envs, fixed_s=whole_s * plan.is_vectorised)
    passes = AffineCost.of(
        costs.inference_s / workload.num_passes, plan.num_envs, fixed_s=plan.batching.forward_s
    )
    queries, count = envs * workload.segment_length, plan.trajectories_per_update
    # A pass of values and a pass of samples are the same stage there.
    service_s = {
        size: _varied(passes.seconds(size), plan, "inference")
        for size in range(envs, rows + 1, envs)
    }
    nothing = np.zeros(0)
    return StageSamples(
        chunk_s={envs: _varied(chunk.seconds(envs), plan, "simulation")},
        begin_s=nothing,
        finish_s=nothing,
        service_s=service_s,
        value_s=service_s,
        after_s=nothing,
        answer_s=nothing,
        swap_s=nothing,
        train_s={queries * count: _varied(costs.training_s, plan, "training")},
        gradient_s={queries: _varied(costs.training_s / count, plan, "training")},
        publish_s=nothing,
        between_s=nothing,
        num_chunks=np.full(1, float(workload.segment_length)),
        num_values=np.ones(1),
        env_steps_per_query=np.full(1, float(workload.num_executed)),
        weight_bytes=0,
        cores={},
        overlap=0.0,
    )


def _varied(mean_s: float, plan: RunPlan, stage: str) -> Samples:
    """Draws of `scaling.emulation.Stage`'s distribution, scaled to the exact mean."""
    variation = plan.variation[stage]
    if not variation:
        return np.full(1, mean_s)
    sigma = math.sqrt(math.log1p(variation**2))
    random = np.random.default_rng(0)
    factors = random.lognormal(-(sigma**2) / 2, sigma, _NUM_DRAWS)
    return mean_s * factors / factors.mean()
