"""The quickstart's job on real LIBERO-Spatial: the same programs, four simulator processes.

A run that shows the path, not a result: the policy is small and starts from nothing, and two
updates teach it nothing. Raise learning.num_updates and start from a checkpoint for more.

Command:   python -m jaxvla.main --config=configs/libero_spatial_ppo.py
Hardware:  2 CPU cores, 8 GB of memory, software OpenGL, the `libero` extra
Time:      about 5 minutes
Result:    2 updates; `--job=evaluate` writes videos of the LIBERO scenes; success stays 0
"""

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.envs.libero_host import LiberoHostConfig
from jaxvla.models.pi_config import tiny_config


def get_config() -> c.ExperimentConfig:
    """See the module docstring."""
    return c.ExperimentConfig(
        name="libero_spatial_ppo",
        env=LiberoHostConfig(suite="libero_spatial", task_ids=(0, 1), image_size=64),
        model=tiny_config(),
        algorithm=PPOConfig(bootstrap_truncated=False),
        # Every group holds as many envs as there are tasks, so that each one plays them all.
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=2, segment_length=8),
        learning=c.LearningConfig(num_updates=2, trajectories_per_update=2),
        evaluation=c.EvaluationConfig(num_episodes=4, num_videos=1),
        checkpoint=c.CheckpointConfig(interval=1),
    )
