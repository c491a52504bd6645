"""The main job on a laptop: a tiny VLA learns to reach coloured blocks, asynchronously.

Command:   bash scripts/quickstart.sh
Hardware:  2 CPU cores
Time:      12m35s with installation, 1,200 CPU-seconds
Result:    success from 0.44 to 0.89 with the shipped seed, see docs/benchmarks.md
"""

import dataclasses

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.envs.tabletop import TabletopConfig
from jaxvla.models.pi_config import tiny_config


def get_config() -> c.ExperimentConfig:
    """See the module docstring."""
    return c.ExperimentConfig(
        name="quickstart",
        env=TabletopConfig(tasks=("reach",), num_executed=4),
        # After the warm start RL trains the action expert and the critic alone: vision and
        # language have been grounded, and their encodings serve all the epochs of an update.
        model=dataclasses.replace(tiny_config(), detach_value=True),
        algorithm=PPOConfig(num_epochs=4, num_minibatches=2, bootstrap_truncated=False),
        optimizer=c.OptimizerConfig(
            learning_rate=1.5e-4,
            value_learning_rate=2e-3,
            warmup_steps=12,
            decay_steps=500,
            final_fraction=0.4,
            trainable=EXPERT_AND_CRITIC,
        ),
        warm_start=c.WarmStartConfig(
            num_grounding_steps=300,
            num_steps=380,
            num_episodes=640,
            batch_size=32,
            optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=30, decay_steps=350),
        ),
        simulation=c.SimulationConfig(num_groups=2, envs_per_group=32, segment_length=16),
        serving=c.ServingConfig(max_batch=32),
        learning=c.LearningConfig(num_updates=64, trajectories_per_update=2, encode_once=True),
        evaluation=c.EvaluationConfig(num_episodes=256),
    )


EXPERT_AND_CRITIC = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^(value|noise)_head/"
"""Parameter paths of the action expert, its projections, and the heads of RL."""
