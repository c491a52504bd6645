"""pi0.5 on LIBERO-Spatial by asynchronous GRPO, with piRL's hyper-parameters (arXiv:2510.25889).

As configs/pi05_libero_ppo.py without a critic: groups of eight episodes that begin alike. piRL
leaves out groups of a success rate outside [0.1, 0.9], which of eight episodes are all or none.

Command:   python -m jaxvla.main --config=configs/pi05_libero_grpo.py
Hardware:  8 accelerators of 80 GB, 64 LIBERO processes; extras `libero` and `openpi`
Time:      never run at this size; --dry_run says what a device holds (docs/pi0.md)
Twin:      --config=configs/pi05_libero_grpo.py:tiny, the same path with a tiny model on the
           tabletop env, minutes on 2 CPU cores; docs/pi0.md has its figures
"""

import dataclasses

from jaxvla import config as c
from jaxvla.algorithms.grpo import GRPOConfig
from jaxvla.envs.libero_host import LiberoHostConfig
from jaxvla.envs.tabletop import TabletopConfig
from jaxvla.models.pi_config import pi05_config, tiny_config

EXPERT = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^noise_head/"
"""Parameter paths of the action expert, its projections, and the noise head."""


def get_config(size: str = "full") -> c.ExperimentConfig:
    """See the module docstring.

    Args:
      size: "full" or "tiny".
    """
    return {"full": full, "tiny": tiny}[size]()


def full() -> c.ExperimentConfig:
    """64 groups of 8 episodes per update, in minibatches of 2,048 samples."""
    return c.ExperimentConfig(
        name="pi05_libero_grpo",
        env=LiberoHostConfig(
            suite="libero_spatial", image_size=224, num_executed=5, max_episode_steps=240
        ),
        model=dataclasses.replace(
            pi05_config(),
            action_horizon=10,
            state_input="none",
            # Padding changes nothing, so no more than the instructions need instead of 200.
            max_tokens=-1,
            tokenizer="paligemma",
            initial_weights="gs://openpi-assets/checkpoints/pi05_libero",
            num_denoise_steps=3,
            noise_level=0.5,
        ),
        algorithm=GRPOConfig(num_epochs=1, num_minibatches=12, dual_clip=3.0, filter_uniform=True),
        optimizer=optimizer(5e-6),
        simulation=c.SimulationConfig(
            num_groups=8, envs_per_group=8, group_size=8, segment_length=-1
        ),
        serving=c.ServingConfig(buckets=(8, 16, 64)),
        meshes=c.MeshesConfig(layout="simulation+serving=4 learning=4:fsdp4"),
        learning=c.LearningConfig(num_updates=150, trajectories_per_update=64, num_microbatches=4),
        evaluation=c.EvaluationConfig(num_episodes=500, interval=10, num_videos=1),
    )


def tiny() -> c.ExperimentConfig:
    """The twin, see configs/pi05_libero_ppo.py."""
    return c.ExperimentConfig(
        name="pi05_libero_grpo_tiny",
        env=TabletopConfig(tasks=("reach",), num_executed=4),
        model=dataclasses.replace(
            tiny_config(), state_input="none", num_denoise_steps=3, noise_level=0.5
        ),
        algorithm=GRPOConfig(num_epochs=2, dual_clip=3.0, filter_uniform=True),
        optimizer=optimizer(1e-4),
        finetune=c.FinetuneConfig(
            dataset=c.DatasetConfig(kind="expert", num_episodes=640),
            num_steps=700,
            ema_decay=0.98,
            compute_norm_stats=True,
            optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=30, decay_steps=670),
        ),
        simulation=c.SimulationConfig(
            num_groups=2, envs_per_group=32, group_size=8, segment_length=-1
        ),
        serving=c.ServingConfig(max_batch=32),
        learning=c.LearningConfig(num_updates=48, trajectories_per_update=4, encode_once=True),
        evaluation=c.EvaluationConfig(num_episodes=256),
    )


def optimizer(learning_rate: float) -> c.OptimizerConfig:
    """AdamW as piRL has it, on the action expert."""
    return c.OptimizerConfig(
        learning_rate=learning_rate,
        beta2=0.95,
        weight_decay=0.01,
        clip_norm=1.0,
        trainable=EXPERT,
    )
