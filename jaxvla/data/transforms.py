"""From openpi's requests to what a policy reads, and from its actions back. All on the host.

The way in, as pi0 and pi0.5 were trained (openpi, commit 15a9616):
`libero_inputs`, `to_delta` where the policy predicts deltas, `normalize_on_host`, the prompt
(pi0.5 reads the normalised state in it), and last `pad_last` to the model's sizes. The way
out: `unnormalize_on_host`, `to_absolute` where it predicts deltas, `libero_actions`.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvla.data.images import resize_with_pad_on_host

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's cameras in the order of their tokens."""

LIBERO_STATE_DIM = 8
"""Position of the gripper 3 (m), its rotation as axis-angle 3 (rad), its fingers 2 (m)."""

LIBERO_ACTION_DIM = 7
"""Translation 3, rotation 3, gripper 1, in [-1, 1]."""

LIBERO_DELTA_MASK = (True,) * 6 + (False,)
"""Actions relative to the state in openpi's `pi0_libero`. `pi05_libero` has none of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RobotInputs:
    """One observation in raw units, its cameras in the order of `CAMERAS`."""

    images: np.ndarray
    """uint8 [C, h, w, 3], black where a camera is missing."""
    image_mask: np.ndarray
    """bool [C], False where a camera is missing."""
    state: np.ndarray
    """[S], dtype as in the request."""
    prompt: str
    """Instruction in natural language."""
    actions: np.ndarray | None = None
    """[H, A] in a training sample, dtype as in the request; None otherwise."""


def libero_inputs(
    request: Mapping[str, Any],
    image_size: int = 224,
    *,
    num_cameras: int = len(CAMERAS),
    state_dim: int = LIBERO_STATE_DIM,
    action_dim: int = LIBERO_ACTION_DIM,
) -> RobotInputs:
    """Reads an observation of LIBERO, or of another robot, under openpi's keys for LIBERO.

    Args:
      request: "observation/image" and "observation/wrist_image", each [h, w, 3] or [3, h, w],
        uint8 or floating in [0, 1], upright; "observation/state" [S]; "prompt" str; in a
        training sample "actions" [H, A]. Other keys are left alone.
      image_size: pixels of the square images that the model reads.
      num_cameras: C, the cameras that the model reads, in [1, 3].
      state_dim: S.
      action_dim: A.

    Returns:
      The first C of `CAMERAS`. The right wrist camera is missing: LIBERO has none.

    Raises:
      ValueError: a key is missing or its value has another shape, dtype or range.
    """
    if not 1 <= num_cameras <= len(CAMERAS):
        raise ValueError(f"num_cameras = {num_cameras}: openpi's models read 1 to {len(CAMERAS)}")
    seen = [
        resize_with_pad_on_host(_image(request, f"observation/{name}"), image_size, image_size)
        for name in ("image", "wrist_image")[:num_cameras]
    ]
    missing = [np.zeros_like(seen[0])] * (num_cameras - len(seen))
    actions = None
    if "actions" in request:
        actions = _vectors(request, "actions", action_dim, ndim=2)
    return RobotInputs(
        images=np.stack(seen + missing),
        image_mask=np.arange(num_cameras) < len(seen),
        state=_vectors(request, "observation/state", state_dim, ndim=1),
        prompt=_prompt(request),
        actions=actions,
    )


def libero_actions(actions: np.ndarray) -> np.ndarray:
    """The 7 dimensions of [..., A], A >= 7, that LIBERO executes.

    Raises:
      ValueError: there are fewer.
    """
    if actions.shape[-1] < LIBERO_ACTION_DIM:
        raise ValueError(f"actions have shape {actions.shape}; LIBERO needs {LIBERO_ACTION_DIM}")
    return actions[..., :LIBERO_ACTION_DIM]


def to_delta(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Absolute actions -> relative to the state at the start of the chunk, where the mask says.

    Args:
      actions: [..., H, A], env units.
      state: [..., S], env units; state i belongs to action i.
      mask: True at dimensions that are made relative; those beyond it are kept.

    Returns:
      [..., H, A], a new array.

    Raises:
      ValueError: the mask is longer than actions or state.
    """
    return actions - _origin(actions, state, mask)


def to_absolute(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """The inverse of `to_delta`, with the same arguments and errors."""
    return actions + _origin(actions, state, mask)


def pad_last(x: np.ndarray, size: int) -> np.ndarray:
    """Appends zeros to the last axis up to `size`; the dtype stays.

    Raises:
      ValueError: the axis is longer than that.
    """
    missing = size - x.shape[-1]
    if missing < 0:
        raise ValueError(f"x has shape {x.shape}: its last axis is longer than size = {size}")
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def _origin(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """What is added to a delta: [..., 1, A], the state where the mask is True, else 0."""
    size = len(mask)
    if size > min(actions.shape[-1], state.shape[-1]):
        raise ValueError(
            f"mask has {size} dimensions, actions {actions.shape[-1]}, state {state.shape[-1]};"
            " shorten the mask"
        )
    origin = np.where(np.asarray(mask, bool), state[..., :size], 0)
    return pad_last(origin, actions.shape[-1])[..., None, :]


def _entry(request: Mapping[str, Any], key: str) -> Any:
    if key not in request:
        raise ValueError(f"the request has no {key!r}; it has {', '.join(sorted(request))}")
    return request[key]


def _image(request: Mapping[str, Any], key: str) -> np.ndarray:
    """uint8 [h, w, 3]."""
    image = np.asarray(_entry(request, key))
    if image.ndim != 3 or 0 in image.shape or 3 not in (image.shape[0], image.shape[-1]):
        raise ValueError(f"{key!r} has shape {image.shape}: send [h, w, 3] or [3, h, w]")
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0.0 and image.max() <= 1.0):
            raise ValueError(f"{key!r} is {image.dtype} outside [0, 1]: send uint8, or scale it")
        image = (255 * image).astype(np.uint8)  # cut, not rounded, as openpi does
    if image.dtype != np.uint8:
        raise ValueError(f"{key!r} is {image.dtype}: send uint8, or floating point in [0, 1]")
    return np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image


def _vectors(request: Mapping[str, Any], key: str, size: int, *, ndim: int) -> np.ndarray:
    """[..., size] of real numbers."""
    values = np.asarray(_entry(request, key))
    if values.ndim != ndim or values.shape[-1] != size:
        expected = ", ".join(["H"] * (ndim - 1) + [str(size)])
        raise ValueError(f"{key!r} has shape {values.shape}: send [{expected}]")
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"{key!r} = {values} is no finite real numbers")
    return values


def _prompt(request: Mapping[str, Any]) -> str:
    prompt = _entry(request, "prompt")
    if isinstance(prompt, np.ndarray) and prompt.ndim == 0:
        prompt = prompt.item()  # strings come as arrays from data loaders
    if not isinstance(prompt, str):
        # What strangers send may be long.
        raise ValueError(f"'prompt' = {reprlib.repr(prompt)} is no text: send one str")
    return prompt
