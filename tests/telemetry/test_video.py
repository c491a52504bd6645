"""Videos read back."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from jaxvla.telemetry.video import MIN_HEIGHT, write_video

COLORS = [(200, 40, 40), (40, 180, 60), (50, 70, 210)]
CODEC_TOLERANCE = 4.0  # of 255: 8-bit YUV rounding and quantisation on uniform patches


def solid(color, *, num_frames=5, height=64, width=64):
    return np.full((num_frames, height, width, 3), color, np.uint8)


def write(path, frames, **changes):
    options = {"fps": 10.0, "instruction": "reach the red block", "success": True} | changes
    return write_video(path, frames, **options)


def read(path):
    """Frames uint8 [n, h, w, 3] and the frame rate."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True, timeout=60)
    stream = re.search(r"Video: h264.*?, (\d+)x(\d+).*?, ([\d.]+) fps", decoded.stderr.decode())
    assert stream is not None
    width, height = int(stream[1]), int(stream[2])
    video = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, height, width, 3)
    return video, float(stream[3])


def test_frames_come_back_in_number_size_rate_and_colour(tmp_path):
    frames = np.concatenate([solid(color, num_frames=4) for color in COLORS])
    path = write(tmp_path / "videos" / "episode.mp4", frames)
    assert path == tmp_path / "videos" / "episode.mp4"
    video, fps = read(path)
    assert len(video) == 12 and fps == 10.0
    assert video.shape[2] == 256 and video.shape[1] > MIN_HEIGHT
    for index, picture in enumerate(video):
        mean = picture[:MIN_HEIGHT].mean((0, 1))
        np.testing.assert_allclose(mean, COLORS[index // 4], atol=CODEC_TOLERANCE)
    assert [file.name for file in path.parent.iterdir()] == ["episode.mp4"]


def test_magnification_keeps_pixels_square_and_in_place(tmp_path):
    frames = solid((0, 0, 0), height=2, width=2)
    frames[:, 0, 1] = 255
    video, _ = read(write(tmp_path / "episode.mp4", frames))
    quadrants = video[0][:256].reshape(2, 128, 2, 128, 3).mean((1, 3, 4))
    np.testing.assert_allclose(quadrants, [[0, 255], [0, 0]], atol=CODEC_TOLERANCE)


def test_cameras_stand_side_by_side(tmp_path):
    frames = np.stack([solid(color) for color in COLORS], axis=1)
    video, _ = read(write(tmp_path / "episode.mp4", frames))
    assert video.shape[2] == 3 * 256
    thirds = video[0][:256].reshape(256, 3, 256, 3).mean((0, 2))
    np.testing.assert_allclose(thirds, COLORS, atol=CODEC_TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (255, 255), (257, 301), (300, 256)])
def test_sides_are_even_and_high_enough(tmp_path, height, width):
    frames = solid(COLORS[0], num_frames=2, height=height, width=width)
    video, _ = read(write(tmp_path / "episode.mp4", frames))
    assert video.shape[1] % 2 == video.shape[2] % 2 == 0
    assert video.shape[1] > MIN_HEIGHT and video.shape[2] >= width


def caption(video):
    return video[0][256:].astype(int)


def test_caption_shows_outcome_and_wraps_the_instruction(tmp_path):
    frames = solid(COLORS[2])
    success = caption(read(write(tmp_path / "a.mp4", frames))[0])
    failure = caption(read(write(tmp_path / "b.mp4", frames, success=False))[0])
    green = (success[..., 1] - success[..., 0] > 60).sum()
    red = (failure[..., 0] - failure[..., 1] > 60).sum()
    assert green > 50 and red > 50
    assert (success[..., 0] - success[..., 1] > 60).sum() == 0
    long = caption(read(write(tmp_path / "c.mp4", frames, instruction="push it left " * 12))[0])
    assert long.shape[0] > success.shape[0] and long.shape[1] == success.shape[1]
    # Dark margin on the right: no line runs out of the picture.
    assert long[:, -4:].max() < 80


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32, want uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no picture"),
        (np.zeros((2, 0, 8, 8, 3), np.uint8), "no picture"),
        (np.zeros((2, 8, 8), np.uint8), "want"),
        (np.zeros((2, 8, 8, 4), np.uint8), "want"),
    ],
)
def test_wrong_frames_are_refused_before_a_file_exists(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "episode.mp4", frames)
    assert not list(tmp_path.iterdir())
