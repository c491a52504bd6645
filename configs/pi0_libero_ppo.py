"""pi0 on LIBERO-Spatial by asynchronous PPO, with piRL's hyper-parameters (arXiv:2510.25889).

As configs/pi05_libero_ppo.py, for pi0: the state is a token, statistics are z-scores, actions are
relative to the state, as openpi's pi0_libero was trained; four epochs of four denoise steps.

Command:   python -m jaxvla.main --config=configs/pi0_libero_ppo.py
Hardware:  8 accelerators of 80 GB, 64 LIBERO processes; extras `libero` and `openpi`
Time:      never run at this size; --dry_run says what a device holds (docs/pi0.md)
Twin:      --config=configs/pi0_libero_ppo.py:tiny, the same path with a tiny model on the tabletop
           env, minutes on 2 CPU cores; docs/pi0.md has its figures
"""

import dataclasses

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.envs.libero_host import LiberoHostConfig
from jaxvla.envs.tabletop import TabletopConfig
from jaxvla.models.pi_config import pi0_config, tiny_config

EXPERT_AND_CRITIC = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^(value|noise)_head/"
"""Parameter paths of the action expert, its projections, and the heads."""


def get_config(size: str = "full") -> c.ExperimentConfig:
    """See the module docstring.

    Args:
      size: "full" or "tiny".
    """
    return {"full": full, "tiny": tiny}[size]()


def full() -> c.ExperimentConfig:
    """512 episodes of 48 chunks per update, in minibatches of 2,048 samples."""
    return c.ExperimentConfig(
        name="pi0_libero_ppo",
        env=LiberoHostConfig(
            suite="libero_spatial", image_size=224, num_executed=5, max_episode_steps=240
        ),
        model=dataclasses.replace(
            pi0_config(),
            delta_dims=6,
            max_tokens=-1,  # padding changes nothing
            tokenizer="paligemma",
            initial_weights="gs://openpi-assets/checkpoints/pi0_libero",
            num_denoise_steps=4,
            noise_level=0.5,
        ),
        algorithm=PPOConfig(num_epochs=4, num_minibatches=12, dual_clip=3.0, value_huber=10.0),
        optimizer=optimizer(5e-6, 1e-4),
        simulation=c.SimulationConfig(num_groups=16, envs_per_group=4, segment_length=48),
        serving=c.ServingConfig(buckets=(4, 16, 64)),
        meshes=c.MeshesConfig(layout="simulation+serving=4 learning=4:fsdp4"),
        learning=c.LearningConfig(num_updates=150, trajectories_per_update=128, num_microbatches=4),
        evaluation=c.EvaluationConfig(num_episodes=500, interval=10, num_videos=1),
    )


def tiny() -> c.ExperimentConfig:
    """The twin. Its actions are not relative: those of the env are velocities, not places."""
    return c.ExperimentConfig(
        name="pi0_libero_ppo_tiny",
        env=TabletopConfig(tasks=("reach",), num_executed=4),
        model=dataclasses.replace(
            tiny_config(),
            time_conditioning="concat",
            normalization="zscore",
            num_denoise_steps=4,
            noise_level=0.5,
        ),
        algorithm=PPOConfig(
            num_epochs=4,
            num_minibatches=2,
            dual_clip=3.0,
            value_huber=10.0,
            bootstrap_truncated=False,
        ),
        optimizer=optimizer(1.5e-4, 2e-3),
        finetune=c.FinetuneConfig(
            dataset=c.DatasetConfig(kind="expert", num_episodes=640),
            num_steps=700,
            ema_decay=0.98,
            compute_norm_stats=True,
            optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=30, decay_steps=670),
        ),
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=32, segment_length=16),
        serving=c.ServingConfig(max_batch=32),
        learning=c.LearningConfig(
            num_updates=48, trajectories_per_update=2, num_microbatches=2, encode_once=True
        ),
        evaluation=c.EvaluationConfig(num_episodes=256),
    )


def optimizer(learning_rate: float, value_learning_rate: float) -> c.OptimizerConfig:
    """AdamW as piRL has it, on the action expert and the critic."""
    return c.OptimizerConfig(
        learning_rate=learning_rate,
        value_learning_rate=value_learning_rate,
        beta2=0.95,
        weight_decay=0.01,
        clip_norm=1.0,
        trainable=EXPERT_AND_CRITIC,
    )
