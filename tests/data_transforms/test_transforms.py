"""Requests in, actions out: openpi's recorded numbers, and a whole way through."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxvla.data.images import resize_with_pad_on_host
from jaxvla.data.normalization import (
    KINDS,
    FieldStats,
    NormStats,
    normalize_on_host,
    unnormalize_on_host,
)
from jaxvla.data.transforms import (
    CAMERAS,
    LIBERO_DELTA_MASK,
    libero_actions,
    libero_inputs,
    pad_last,
    to_absolute,
    to_delta,
)


@pytest.fixture
def request_of_policy(cases) -> dict:
    """The observation that openpi's whole policies were given."""
    names = ("observation/image", "observation/wrist_image", "observation/state")
    request = {name: cases[f"policy/{name}"] for name in names}
    return request | {"prompt": "pick up the black bowl"}


# ------------------------------------------------------------------------------- actions


def test_delta_matches_recorded(cases) -> None:
    actions, state = cases["in/actions"], cases["in/state"]
    before = actions.copy()
    np.testing.assert_array_equal(to_delta(actions, state, LIBERO_DELTA_MASK), cases["delta"])
    np.testing.assert_array_equal(actions, before)  # openpi changes its argument


def test_absolute_matches_recorded(cases) -> None:
    actual = to_absolute(cases["in/actions"], cases["in/state"], LIBERO_DELTA_MASK)
    np.testing.assert_array_equal(actual, cases["absolute"])


@hypothesis.given(
    mask=st.lists(st.booleans(), max_size=5),
    seed=st.integers(0, 9999),
    lead=st.sampled_from([(), (2,), (2, 3)]),
)
@hypothesis.settings(deadline=None)
def test_absolute_undoes_delta(mask: list[bool], seed: int, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    actions, state = rng.normal(size=(*lead, 4, 7)), rng.normal(size=(*lead, 5))
    delta = to_delta(actions, state, mask)
    np.testing.assert_allclose(to_absolute(delta, state, mask), actions, rtol=0, atol=1e-14)
    for dim in range(7):
        is_relative = dim < len(mask) and mask[dim]
        moved = actions[..., dim] - delta[..., dim] - is_relative * state[..., None, dim % 5]
        np.testing.assert_allclose(moved, 0.0, rtol=0, atol=1e-14)


def test_mask_beyond_the_state_is_refused() -> None:
    for actions, state in (((4, 7), 2), ((4, 2), 7)):
        with pytest.raises(ValueError, match="mask has 3 dimensions"):
            to_delta(np.zeros(actions), np.zeros(state), (True, False, False))


def test_padding_matches_recorded(cases) -> None:
    padded = pad_last(cases["in/actions"], 32)
    np.testing.assert_array_equal(padded, cases["pad"])
    assert pad_last(np.ones(3, np.float32), 4).dtype == np.float32
    with pytest.raises(ValueError, match=r"shape \(6, 32\).*longer than size = 7"):
        pad_last(padded, 7)


def test_libero_executes_the_first_seven_dimensions() -> None:
    actions = np.arange(64.0).reshape(2, 32)
    np.testing.assert_array_equal(libero_actions(actions), actions[:, :7])
    with pytest.raises(ValueError, match=r"shape \(2, 6\)"):
        libero_actions(actions[:, :6])


# -------------------------------------------------------------------------------- inputs


def test_libero_inputs(cases, request_of_policy) -> None:
    inputs = libero_inputs(request_of_policy, 28)
    assert CAMERAS == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    for index, name in enumerate(("image", "wrist_image")):
        expected = resize_with_pad_on_host(cases[f"policy/observation/{name}"], 28, 28)
        np.testing.assert_array_equal(inputs.images[index], expected)
    assert not inputs.images[2].any() and inputs.images.dtype == np.uint8
    assert inputs.image_mask.tolist() == [True, True, False]
    np.testing.assert_array_equal(inputs.state, cases["policy/observation/state"])
    assert inputs.prompt == "pick up the black bowl" and inputs.actions is None
    assert libero_inputs(request_of_policy).images.shape == (3, 224, 224, 3)


def test_a_robot_with_other_sizes(request_of_policy) -> None:
    state = np.arange(5.0)
    request = request_of_policy | {"observation/state": state, "actions": np.zeros((2, 4))}
    sizes = {"state_dim": 5, "action_dim": 4}
    three = libero_inputs(request_of_policy, 28)
    for num_cameras in (1, 2, 3):
        inputs = libero_inputs(request, 28, num_cameras=num_cameras, **sizes)
        np.testing.assert_array_equal(inputs.images, three.images[:num_cameras])
        assert inputs.image_mask.tolist() == [True, True, False][:num_cameras]
        np.testing.assert_array_equal(inputs.state, state)
        assert inputs.actions is not None and inputs.actions.shape == (2, 4)
    alone = {key: request[key] for key in request if key != "observation/wrist_image"}
    assert libero_inputs(alone, 28, num_cameras=1, **sizes).images.shape == (1, 28, 28, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 4\): send \[H, 7\]"):
        libero_inputs(request, 28, state_dim=5)
    for num_cameras in (0, 4):
        with pytest.raises(ValueError, match=f"num_cameras = {num_cameras}"):
            libero_inputs(request, 28, num_cameras=num_cameras, **sizes)


def test_other_layouts_of_the_same_image(request_of_policy) -> None:
    expected = libero_inputs(request_of_policy, 28).images
    image = request_of_policy["observation/image"]
    # Floats are cut to whole levels: nine tenths of a level more change nothing.
    floats = np.minimum(image + 0.9, 255.0) / 255.0
    for other in (np.moveaxis(image, -1, 0), floats, floats.astype(np.float32)):
        request = request_of_policy | {"observation/image": other}
        np.testing.assert_array_equal(libero_inputs(request, 28).images, expected)


def test_a_training_sample_keeps_its_actions(cases, request_of_policy) -> None:
    request = request_of_policy | {"actions": cases["in/actions"], "prompt": np.array("lift")}
    inputs = libero_inputs(request, 28)
    assert inputs.actions is not None and inputs.prompt == "lift"
    np.testing.assert_array_equal(inputs.actions, cases["in/actions"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("observation/image", np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
        ("observation/image", np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        ("observation/wrist_image", np.full((4, 4, 3), 1.1), r"float64 outside \[0, 1\]"),
        ("observation/wrist_image", np.full((4, 4, 3), np.nan), r"outside \[0, 1\]"),
        ("observation/wrist_image", np.zeros((4, 4, 3), np.int32), "is int32"),
        ("observation/state", np.zeros(7), r"shape \(7,\): send \[8\]"),
        ("observation/state", np.full(8, np.inf), "no finite real"),
        ("observation/state", np.full(8, "x"), "no finite real"),
        ("actions", np.zeros((4, 8)), r"shape \(4, 8\): send \[H, 7\]"),
        ("prompt", 3, "= 3 is no text"),
    ],
)
def test_bad_values_name_their_key(request_of_policy, key: str, value, message: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}'.*{message}"):
        libero_inputs(request_of_policy | {key: value})


@pytest.mark.parametrize(
    "key", ["observation/image", "observation/wrist_image", "observation/state", "prompt"]
)
def test_missing_keys_are_named(request_of_policy, key: str) -> None:
    del request_of_policy[key]
    with pytest.raises(ValueError, match=f"has no '{key}'; it has "):
        libero_inputs(request_of_policy)


# --------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("model", ["pi0", "pi05"])
@pytest.mark.parametrize("mask", [LIBERO_DELTA_MASK, ()], ids=["delta", "absolute"])
def test_recorded_actions_go_to_a_models_space_and_back(
    cases, request_of_policy, model: str, mask: tuple[bool, ...]
) -> None:
    """A model that predicts perfectly makes a policy that returns the recorded actions."""
    names = ("mean", "std", "q01", "q99")
    state_stats, action_stats = (
        FieldStats(**{name: cases[f"stats/{field}/{name}"] for name in names})
        for field in ("state", "actions")
    )
    kind = KINDS[model == "pi05"]
    stats = NormStats(state=state_stats, actions=action_stats, kind=kind)
    recorded = cases[f"policy/{model}/actions"]
    inputs = libero_inputs(request_of_policy | {"actions": recorded}, 28)
    assert inputs.actions is not None
    delta = to_delta(inputs.actions, inputs.state, mask)
    target = pad_last(normalize_on_host(delta, stats.actions, kind), 32)
    state = pad_last(normalize_on_host(inputs.state, stats.state, kind), 32)
    assert target.shape == (6, 32) and not target[:, 7:].any() and not state[8:].any()
    raw_state = unnormalize_on_host(state, stats.state, kind)
    predicted = unnormalize_on_host(target, stats.actions, kind)
    actions = libero_actions(to_absolute(predicted, raw_state, mask))
    np.testing.assert_allclose(actions, recorded, rtol=0, atol=1e-14)
