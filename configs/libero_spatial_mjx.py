"""Two LIBERO-Spatial tasks in libero_mjx: demonstrations, imitation, asynchronous RL.

Before it, once, and after it, in LIBERO itself:
           python -m jaxvla.main --config=configs/libero_spatial_mjx.py --job=compile_tasks
           python -m jaxvla.main --config=configs/libero_spatial_mjx.py --job=evaluate --judge

Command:   python -m jaxvla.main --config=configs/libero_spatial_mjx.py
Hardware:  2 CPU cores, the `libero` extra for the first and the last command. With a GPU or
           TPU: --config.env.physics=mjx and more envs per group
Time:      1 hour of warm start, then about a minute per update, on two busy cores; stopped
           after 20 updates
Result:    success 0.12 after the warm start, 0.31 after 20 updates, 0.28 in LIBERO itself, see
           docs/libero_mjx.md
"""

import dataclasses

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.envs.libero_mjx import LiberoMjxConfig
from jaxvla.models.pi_config import tiny_config


def get_config() -> c.ExperimentConfig:
    """See the module docstring."""
    return c.ExperimentConfig(
        name="libero_spatial_mjx",
        env=LiberoMjxConfig(
            suite="libero_spatial",
            task_ids=(0, 1),
            image_size=64,
            max_episode_steps=112,  # the expert takes about 60
            physics="mujoco",
        ),
        model=dataclasses.replace(tiny_config(), detach_value=True),
        algorithm=PPOConfig(num_epochs=2, num_minibatches=2, bootstrap_truncated=False),
        optimizer=c.OptimizerConfig(
            learning_rate=1e-4,
            value_learning_rate=2e-3,
            warmup_steps=12,
            trainable=EXPERT_AND_CRITIC,
        ),
        warm_start=c.WarmStartConfig(
            num_grounding_steps=300,
            num_steps=4000,
            num_episodes=256,
            noise_std=0.15,
            batch_size=32,
            optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=50, decay_steps=3950),
        ),
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=16, segment_length=16),
        serving=c.ServingConfig(max_batch=16),
        learning=c.LearningConfig(num_updates=64, trajectories_per_update=2, encode_once=True),
        evaluation=c.EvaluationConfig(num_episodes=64),
    )


EXPERT_AND_CRITIC = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^(value|noise)_head/"
"""Parameter paths of the action expert, its projections, and the heads of RL."""
