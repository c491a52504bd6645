"""Videos of episodes: cameras side by side over a caption with instruction and outcome."""

import math
import pathlib
import warnings

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_HEIGHT = 256
"""Pixels; smaller pictures are magnified by the least whole factor that reaches it."""

_FONT_SIZE = 14
_MARGIN = 5
_BACKGROUND = (24, 24, 24)
_TEXT = (235, 235, 235)
_OUTCOMES = {True: ("success", (90, 210, 110)), False: ("failure", (235, 95, 85))}


def write_video(
    path: pathlib.Path, frames: np.ndarray, *, fps: float, instruction: str, success: bool
) -> pathlib.Path:
    """Writes an episode as H.264 mp4. `path` appears only when the video is whole.

    Args:
      path: ends in .mp4; its folder is made when missing.
      frames: uint8 [n, h, w, 3] RGB, or [n, C, h, w, 3] with C cameras put side by side.
      fps: frames per second.
      instruction: sentence shown below the picture.
      success: outcome shown before the sentence.

    Returns:
      `path`.

    Raises:
      ValueError: no frames, or a wrong dtype or shape.
    """
    pictures = _side_by_side(frames)
    factor = math.ceil(MIN_HEIGHT / pictures.shape[1])
    width = pictures.shape[2] * factor
    caption = _caption(width, instruction=instruction, success=success)
    height = pictures.shape[1] * factor + caption.shape[0]
    # H.264 halves the resolution of colour, hence even sides only.
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    encoder = imageio_ffmpeg.write_frames(
        str(partial),
        (width + width % 2, height + height % 2),
        fps=fps,  # pyright: ignore[reportArgumentType]  # documented as float, default 16
        codec="libx264",
        quality=8,
        macro_block_size=2,
    )
    try:
        with warnings.catch_warnings():
            # The child runs ffmpeg at once, so locks of JAX's threads do not matter to it.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            encoder.send(None)
        for picture in pictures:
            large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            frame = np.pad(np.concatenate([large, caption]), padding, mode="edge")
            encoder.send(np.ascontiguousarray(frame))
        encoder.close()
        partial.replace(path)
    finally:
        encoder.close()
        partial.unlink(missing_ok=True)
    return path


def _side_by_side(frames: np.ndarray) -> np.ndarray:
    """Checked frames as uint8 [n, h, C*w, 3]."""
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}, want uint8")
    if frames.ndim not in (4, 5) or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.shape}, want [n, h, w, 3] or [n, C, h, w, 3]")
    if not frames.size:
        raise ValueError(f"frames {frames.shape} hold no picture")
    return np.concatenate(np.moveaxis(frames, 1, 0), axis=2) if frames.ndim == 5 else frames


def _caption(width: int, *, instruction: str, success: bool) -> np.ndarray:
    """Strip below the picture, uint8 [height, width, 3]; the sentence wraps at words."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    outcome, color = _OUTCOMES[success]
    lines = [outcome, *_wrap(instruction, font, width - 2 * _MARGIN)]
    line_height = _FONT_SIZE + _MARGIN
    strip = Image.new("RGB", (width, line_height * len(lines) + 2 * _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        position = (_MARGIN, _MARGIN + row * line_height)
        draw.text(position, line, fill=_TEXT if row else color, font=font)
    return np.asarray(strip)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Lines of whole words, each at most `width` pixels long unless one word is longer."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
