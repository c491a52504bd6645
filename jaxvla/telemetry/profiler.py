"""A window of updates seen by JAX's profiler: operators, memory and transfers of every device.

trace.json says which program waits for whom; this says what a device does meanwhile.
"""

import pathlib

import jax

from jaxvla.config import TelemetryConfig

PROFILE_DIRECTORY = "profile"
"""In the work directory. TensorBoard and xprof read it; Perfetto the *.trace.json.gz within."""


class ProfileWindow:
    """Runs the profiler for `telemetry.profile_updates` updates. For one thread.

    It sees the devices and threads of this process: with `runtime.kind=local` all programs.

    Args:
      settings: which updates.
      workdir: where to write `PROFILE_DIRECTORY`.
    """

    def __init__(self, settings: TelemetryConfig, workdir: pathlib.Path):
        self._first = settings.profile_start
        self._end = settings.profile_start + settings.profile_updates
        self._directory = workdir / PROFILE_DIRECTORY
        self._is_open = False

    def reached(self, version: int) -> None:
        """The next update is the one after `version`: starts or ends the profile."""
        is_within = self._first <= version < self._end
        if is_within and not self._is_open:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a span per Python call drowns the rest
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._is_open = True
        elif not is_within:
            self.close()

    def close(self) -> None:
        """Writes what there is of the profile."""
        if self._is_open:
            self._is_open = False
            jax.profiler.stop_trace()
