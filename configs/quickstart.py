"""The main job on a laptop: a tiny VLA learns to reach coloured blocks, asynchronously.

Command:   bash scripts/quickstart.sh
Hardware:  2 CPU cores
"""

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.envs.tabletop import TabletopConfig
from jaxvla.models.pi_config import tiny_config


def get_config() -> c.ExperimentConfig:
    """See the module docstring."""
    return c.ExperimentConfig(
        name="quickstart",
        env=TabletopConfig(tasks=("reach",)),
        model=tiny_config(),
        algorithm=PPOConfig(num_epochs=1, num_minibatches=4),
        optimizer=c.OptimizerConfig(learning_rate=1e-4, value_learning_rate=3e-4),
        warm_start=c.WarmStartConfig(
            num_steps=600,
            num_episodes=512,
            batch_size=64,
            optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=30, decay_steps=570),
        ),
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=32, segment_length=8),
        serving=c.ServingConfig(max_batch=32),
        learning=c.LearningConfig(num_updates=60, trajectories_per_update=2),
    )
