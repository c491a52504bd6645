"""The most memory that this process has held."""

import math
import pathlib
import re

import jax

_STATUS = pathlib.Path("/proc/self/status")
_MIB = 2.0**20


def peak_memory() -> dict[str, float]:
    """Peaks in MiB; NaN where the system, or the device as CPU devices do, says nothing.

    peak_rss_mib: of the process's resident memory (VmHWM of
    https://man7.org/linux/man-pages/man5/proc_pid_status.5.html), without processes of its own.
    peak_device_mib: of what XLA has allocated on the fullest device.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.is_file() else None
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
    return {
        "peak_rss_mib": int(found[1]) / 1024 if found else math.nan,
        "peak_device_mib": max(peaks) / _MIB if peaks else math.nan,
    }
