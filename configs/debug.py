"""Everything at its smallest, in seconds: what the tests run.

Command:   python -m jaxvla.main --config=configs/debug.py
Hardware:  1 CPU core
Time:      about a minute, most of it compilation
Result:    4 updates and an exit code of 0; it learns nothing
"""

import dataclasses

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.envs.tabletop import TabletopConfig
from jaxvla.models.pi_config import tiny_config


def get_config() -> c.ExperimentConfig:
    """See the module docstring."""
    model = dataclasses.replace(
        tiny_config(),
        vision_width=32,
        vision_depth=1,
        vision_mlp_width=32,
        vlm_width=32,
        vlm_mlp_width=64,
        expert_width=32,
        expert_mlp_width=32,
        depth=2,
        value_widths=(16,),
    )
    return c.ExperimentConfig(
        name="debug",
        env=TabletopConfig(tasks=("reach", "push", "lift"), image_size=32, num_executed=4),
        model=model,
        algorithm=PPOConfig(num_epochs=2, num_minibatches=2),
        # Small, so that meshes can be compared: where rounding makes one pixel at an edge another,
        # losses differ in proportion to how far an update moves the policy.
        optimizer=c.OptimizerConfig(learning_rate=1e-4),
        warm_start=c.WarmStartConfig(
            num_steps=4, num_grounding_steps=2, num_episodes=8, batch_size=16
        ),
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=8, segment_length=4),
        serving=c.ServingConfig(max_batch=8),
        learning=c.LearningConfig(num_updates=4, trajectories_per_update=2),
        evaluation=c.EvaluationConfig(num_episodes=6, num_videos=1),
        checkpoint=c.CheckpointConfig(interval=2),
    )
