"""Train functions of a linear policy, compiled once per setting."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import pytest
from jax.sharding import Mesh
from linear_policy import LinearPolicy

from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.config import OptimizerConfig
from jaxvla.layout import parse_layout
from jaxvla.learning.optimizer import make_optimizer
from jaxvla.learning.train_state import TrainState, init_state, state_shardings
from jaxvla.learning.train_step import TrainFunctions
from jaxvla.sharding import make_mesh
from jaxvla.types import Params

# Without LLVM optimisation: compiles six times faster, computes the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def initial_params(policy: Any) -> Params:
    """Fresh parameters on the host: the same numbers for every mesh."""
    return jax.device_get(quick_jit(policy.init)(jax.random.key(0)))


@dataclass(frozen=True, kw_only=True)
class Training:
    """Train functions with what they were made of."""

    functions: TrainFunctions
    policy: Any
    shardings: TrainState
    optimizer: Any

    def fresh_state(self) -> TrainState:
        """A new train state in its place."""
        params = jax.device_put(initial_params(self.policy), self.shardings.params)
        init = quick_jit(lambda p: init_state(p, self.optimizer), out_shardings=self.shardings)
        return init(params)


def learning_mesh(layout: str) -> Mesh:
    """The learning mesh of a layout such as "colocated=4:data2,fsdp2"."""
    return make_mesh(parse_layout(layout).roles["learning"])


@functools.cache
def make_training(
    policy: Any = None,
    algorithm: Any = None,
    *,
    layout: str = "colocated=1",
    num_minibatches: int = 1,
    num_microbatches: int = 1,
    standardize: bool = False,
    trainable: str = ".*",
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    encode_once: bool = False,
) -> Training:
    """Train functions of a policy and an algorithm, by default a linear one and PPO."""
    policy = policy or LinearPolicy()
    algorithm = algorithm or PPO(PPOConfig(standardize_advantages=standardize, entropy_coef=0.01))
    config = OptimizerConfig(
        learning_rate=1e-2, trainable=trainable, eps=eps, weight_decay=weight_decay
    )
    params = jax.eval_shape(policy.init, jax.random.key(0))
    optimizer = make_optimizer(config, params)
    struct = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    mesh = learning_mesh(layout)
    shardings = state_shardings(struct, policy.rules(), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        functions = TrainFunctions(
            policy=policy,
            algorithm=algorithm,
            optimizer=optimizer,
            trainable=trainable,
            mesh=mesh,
            shardings=shardings,
            num_minibatches=num_minibatches,
            num_microbatches=num_microbatches,
            encode_once=encode_once,
        )
    return Training(
        functions=functions,
        policy=policy,
        shardings=shardings,
        optimizer=optimizer,
    )


@pytest.fixture(scope="session")
def training() -> Callable[..., Training]:
    """`make_training`, which compiles once per setting."""
    return make_training
