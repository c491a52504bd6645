"""Single frames of videos, to the frame: seek to the key frame before, decode up to the time."""

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

_MAX_OPEN = 8
"""Videos kept open; a decoder holds some MB."""


class VideoReader:
    """Reads frames by time. For one thread at a time."""

    def __init__(self, *, fps: float):
        """Args:
        fps: frames per second of the videos. A frame is found when one lies within half of its
          duration of the time asked for.
        """
        self._tolerance_s = 0.5 / fps
        self._open: dict[pathlib.Path, Any] = {}

    def read(self, path: pathlib.Path, time_s: float) -> np.ndarray:
        """The frame nearest to a time, uint8 [h, w, 3] RGB.

        Args:
          path: of the video.
          time_s: seconds on the video's clock.

        Raises:
          ValueError: the file cannot be decoded or has no frame at that time, or PyAV is missing.
        """
        container = self._container(path)
        stream = container.streams.video[0]
        frame = None
        # Some files give a key frame too late; then everything from the start is decoded.
        for start_s in (time_s, 0.0):
            container.seek(int(start_s / stream.time_base), stream=stream)
            frame = _nearest(self._frames(path, container, stream), time_s)
            if frame is not None and abs(frame.time - time_s) <= self._tolerance_s:
                return frame.to_ndarray(format="rgb24")
        nearest = "no frame" if frame is None else f"the nearest frame is at {frame.time:.3f} s"
        raise ValueError(f"{path}: no frame at {time_s:.3f} s, {nearest}")

    def close(self) -> None:
        """Closes the files."""
        while self._open:
            self._open.popitem()[1].close()

    def _container(self, path: pathlib.Path) -> Any:
        """Opened, and the last of those in use."""
        container = self._open.pop(path, None) or self._opened(path)
        while len(self._open) >= _MAX_OPEN:
            self._open.pop(next(iter(self._open))).close()
        self._open[path] = container
        return container

    def _opened(self, path: pathlib.Path) -> Any:
        try:
            import av.error
        except ImportError as error:
            raise ValueError("videos need PyAV: pip install 'jaxvla[data]'") from error
        try:
            container = av.open(str(path))
        except (OSError, av.error.FFmpegError) as error:
            raise ValueError(f"{path} cannot be opened: {error}") from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{path} holds no video")
        return container

    def _frames(self, path: pathlib.Path, container: Any, stream: Any) -> Iterable[Any]:
        import av.error

        try:
            yield from container.decode(stream)
        except (OSError, av.error.FFmpegError) as error:
            raise ValueError(f"{path} cannot be decoded: {error}") from error


def _nearest(frames: Iterable[Any], time_s: float) -> Any:
    """The frame nearest to a time; frames come in the order of their times."""
    best = None
    for frame in frames:
        if frame.pts is None:
            continue
        if best is None or abs(frame.time - time_s) < abs(best.time - time_s):
            best = frame
        if frame.time >= time_s:
            break
    return best
