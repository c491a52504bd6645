"""Stages that sleep: what `bench_runtime.py` measures runtimes with where cores are few.

Command:   python scripts/bench_runtime.py --config=scripts/sleeping_stages.py
Hardware:  1 CPU core
Time:      1 s an update by design: two groups make 4 chunk steps of 0.2 s, each with an inference
           of 0.06 s; training takes 0.8 s beside them. So what a chunk query costs on top counts.
Result:    env steps/s; it learns nothing
"""

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.scaling.sleeping import SleepingEnvConfig, SleepingPiConfig


def get_config() -> c.ExperimentConfig:
    """See the module docstring."""
    return c.ExperimentConfig(
        name="sleeping",
        env=SleepingEnvConfig(num_executed=4),
        model=SleepingPiConfig(
            vision_width=32,
            vision_depth=1,
            vision_mlp_width=32,
            vision_heads=4,
            patch_size=16,
            vlm_width=32,
            vlm_mlp_width=64,
            expert_width=32,
            expert_mlp_width=32,
            depth=2,
            num_heads=4,
            num_kv_heads=1,
            head_dim=16,
            vocab_size=320,
            value_widths=(16,),
            train_row_s=0.006,
        ),
        algorithm=PPOConfig(num_epochs=2, num_minibatches=2),
        optimizer=c.OptimizerConfig(learning_rate=1e-4),
        warm_start=c.WarmStartConfig(num_steps=0, num_grounding_steps=0),
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=8, segment_length=4),
        serving=c.ServingConfig(max_batch=8),
        learning=c.LearningConfig(num_updates=12, trajectories_per_update=2),
        evaluation=c.EvaluationConfig(num_episodes=0),
        checkpoint=c.CheckpointConfig(interval=1000),
    )
