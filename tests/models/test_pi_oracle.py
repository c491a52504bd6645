"""The pi models against numbers from openpi's own code, at toy size and full float32.

Tolerances are absolute, for values of order 1, and come from the agreement of two
independent stacks (forward 8e-6, gradients 5e-6 of a tensor's largest entry) plus the
float32 rounding of the flow-time angles, which reach 1570 rad. bfloat16 is compared by the
rms of the difference, as two stacks differ by single roundings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.models import flow, layers, siglip
from jaxvla.models.pi_network import embed_prefix, embed_suffix, run_prefix, run_suffix


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def loop_of(oracle) -> layers.LayerLoop:
    """One case scans its layers and recomputes them, the other unrolls and keeps them."""
    is_scanned = oracle.policy.config.time_conditioning == "concat"
    return layers.LayerLoop(
        max_unrolled=1 if is_scanned else 4, remat="layers" if is_scanned else "none"
    )


def run_model(policy, params, oracle, sample_steps: tuple[int, ...]) -> dict[str, jax.Array]:
    """Every intermediate result under the oracle's names."""
    dtype = jnp.dtype(policy.config.dtype)
    tokens, mask = embed_prefix(params, *oracle.prefix_inputs(), dtype=dtype)
    prefix = run_prefix(params, tokens, mask, loop=loop_of(oracle))
    state, noise = oracle["in/state"], jnp.asarray(oracle["in/noise"])
    suffix = embed_suffix(params, policy.config, state, oracle["in/x_t"], oracle["in/time"])
    results = {
        "prefix_tokens": tokens,
        "prefix_mask": mask,
        "prefix_out": prefix.features,
        "suffix_tokens": suffix.tokens,
        "suffix_out": run_suffix(params, prefix, suffix, loop=loop_of(oracle)),
        "velocity": policy.velocity(params, prefix, state, oracle["in/x_t"], oracle["in/time"]),
    }
    if suffix.condition is not None:
        results["adarms_cond"] = suffix.condition
    start = jnp.zeros(len(noise), jnp.int32)
    draws = flow.Draws(initial=noise, exploration=noise[:, None], step=start)
    for num_steps in sample_steps:
        results[f"sample/{num_steps}"], _, _ = flow.denoise(
            lambda x_t, time: (policy.velocity(params, prefix, state, x_t, time), None),
            draws,
            flow.ode_transitions(num_steps),
        )
    return results


def mean_loss(params, policy, oracle) -> tuple[jax.Array, jax.Array]:
    """Mean and elements of the flow-matching loss at the oracle's draws."""
    tokens, mask = embed_prefix(params, *oracle.prefix_inputs(), dtype=jnp.dtype("float32"))
    loss = policy.flow_matching_loss(
        params,
        run_prefix(params, tokens, mask, loop=policy.config.loop),
        oracle["in/state"],
        oracle["in/actions"],
        oracle["out/loss_noise"],
        oracle["out/loss_time"],
    )
    return loss.mean(), loss


@pytest.fixture(scope="module")
def results(oracle, quick_jit) -> dict[str, np.ndarray]:
    run = quick_jit(lambda params: run_model(oracle.policy, params, oracle, (1, 3, 10)))
    return {name: np.asarray(array) for name, array in run(oracle.params).items()}


def test_parameter_tree_is_openpis(oracle) -> None:
    shapes = jax.eval_shape(oracle.policy.init, jax.random.key(0))
    ours = {path: leaf.shape for path, leaf in oracle.flatten(shapes).items()}
    theirs = {path: leaf.shape for path, leaf in oracle.flatten(oracle.params).items()}
    assert {path: s for path, s in ours.items() if not path.startswith("value_head")} == theirs


def test_image_tokens(oracle, quick_jit) -> None:
    images, *_ = oracle.prefix_inputs()
    encode = quick_jit(lambda p, x: siglip.encode_images(p, x, dtype=jnp.dtype("float32")))
    for index, name in enumerate(oracle.cameras):
        tokens = encode(oracle.params["PaliGemma"]["img"], images[:, index])
        np.testing.assert_allclose(tokens, oracle[f"out/image_tokens/{name}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "atol"),
    [
        ("prefix_tokens", 2e-5),
        ("suffix_tokens", 5e-5),
        ("suffix_out", 1e-4),
        ("velocity", 1e-4),
        ("sample/1", 1e-4),
        ("sample/3", 1e-4),
        ("sample/10", 1e-4),
    ],
)
def test_tokens_and_outputs(oracle, results, name: str, atol: float) -> None:
    np.testing.assert_allclose(results[name], oracle[f"out/{name}"], atol=atol, rtol=0)


def test_prefix_mask(oracle, results) -> None:
    np.testing.assert_array_equal(results["prefix_mask"], oracle["out/prefix_mask"])


def test_prefix_features_of_valid_tokens(oracle, results) -> None:
    valid = oracle["out/prefix_mask"]
    expected = oracle["out/prefix_out"][valid]
    np.testing.assert_allclose(results["prefix_out"][valid], expected, atol=2e-5, rtol=0)


def test_condition_of_adaptive_norms(oracle, results) -> None:
    assert ("adarms_cond" in results) == ("out/adarms_cond" in oracle.arrays)
    if "adarms_cond" in results:
        expected = oracle["out/adarms_cond"]
        np.testing.assert_allclose(results["adarms_cond"], expected, atol=5e-5, rtol=0)


def test_suffix_blocks_and_joint_attention_mask(oracle) -> None:
    inputs = oracle["in/state"], oracle["in/x_t"], oracle["in/time"]
    suffix = embed_suffix(oracle.params, oracle.policy.config, *inputs)
    np.testing.assert_array_equal(suffix.block, np.cumsum(oracle["out/suffix_ar"]))
    assert not oracle["out/prefix_ar"].any()  # the prefix is block 0
    mask = np.concatenate([oracle["out/prefix_mask"], oracle["out/suffix_mask"]], axis=1)
    block = np.concatenate([np.zeros_like(oracle["out/prefix_ar"], np.int32), suffix.block])
    ours = layers.attention_mask(mask, jnp.asarray(block), mask, jnp.asarray(block))
    np.testing.assert_array_equal(ours, oracle["out/attn_mask"])
    np.testing.assert_array_equal(layers.positions_of(jnp.asarray(mask)), oracle["out/positions"])


@pytest.fixture(scope="module")
def loss_and_gradient(oracle, quick_jit):
    loop = loop_of(oracle)
    policy = oracle.variant(remat=loop.remat, max_unrolled_layers=loop.max_unrolled)
    run = jax.value_and_grad(lambda params: mean_loss(params, policy, oracle), has_aux=True)
    (_, loss), gradient = quick_jit(run)(oracle.params)
    return loss, oracle.flatten(gradient)


def test_loss(oracle, loss_and_gradient) -> None:
    loss, _ = loss_and_gradient
    np.testing.assert_allclose(loss, oracle["out/loss"], rtol=5e-5)


def test_gradient_norms(oracle, loss_and_gradient) -> None:
    _, gradient = loss_and_gradient
    assert set(gradient) == set(oracle.flatten(oracle.params))
    for path, array in gradient.items():
        expected = oracle[f"out/gradnorm/{path}"]
        norm = np.linalg.norm(np.asarray(array, np.float64))
        if path.endswith("Attention_0/key/bias"):
            # A key bias shifts all logits of a query alike: its gradient is rounding noise.
            assert norm < 1e-6
        else:
            np.testing.assert_allclose(norm, expected, rtol=5e-5, atol=1e-7, err_msg=path)


def test_gradients(oracle, loss_and_gradient) -> None:
    _, gradient = loss_and_gradient
    recorded = [name for name in oracle.arrays if name.startswith("out/grad/")]
    assert len(recorded) >= 9
    for name in recorded:
        expected = oracle[name]
        atol = 5e-5 * max(np.abs(expected).max(), 1e-3)
        actual = gradient[name.removeprefix("out/grad/")]
        np.testing.assert_allclose(actual, expected, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", ["bf16", "bf16_params"])
def test_bfloat16(oracle, quick_jit, case: str) -> None:
    policy, params = oracle.variant(dtype="bfloat16"), oracle.params
    if case == "bf16_params":
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    results = quick_jit(lambda params: run_model(policy, params, oracle, (10,)))(params)
    assert results["prefix_out"].dtype == jnp.bfloat16
    assert results["velocity"].dtype == jnp.float32
    valid = oracle["out/prefix_mask"]
    for name in ("prefix_tokens", "prefix_out", "suffix_out", "velocity", "sample/10"):
        actual, expected = np.asarray(results[name], np.float32), oracle[f"{case}/{name}"]
        if name == "prefix_out":
            actual, expected = actual[valid], expected[valid]
        error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
        assert error < 0.02, f"{name}: {error:.4f}"
