"""Process settings that JAX on CPU needs before it is imported. No jax here.

Called by the entry point only: importing jaxvla changes no process setting. A setting that
the user has made is left alone. On an accelerator host they concern JAX's CPU backend only.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

_FUSION_FLAG = "--xla_cpu_use_fusion_emitters"
_LEVEL_FLAG = "--xla_backend_optimization_level"
_MIN_THREADS = 8
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of mallopt (https://man7.org/linux/man-pages/man3/mallopt.3.html)."""


def apply() -> list[str]:
    """Makes the settings; returns one line per setting made or missing."""
    lines = []
    # With the fusion emitters one step of a MuJoCo scene takes seconds instead of
    # milliseconds (jaxlib 0.10.2): the kinematic chain is recomputed in every consumer.
    wanted = {_FUSION_FLAG: "false"}
    # Compiles almost twice as fast as level 3 and computes as fast, but is not for GPUs.
    if not _has_accelerator():
        wanted[_LEVEL_FLAG] = "2"
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"{flag}={value}" for flag, value in wanted.items() if flag not in given]
    if missing and given and not given.startswith("-"):
        lines.append(f"XLA_FLAGS names a file, which should have {' '.join(missing)}")
    elif missing:
        # In front: XLA reads no further than the first word that is no flag, such as
        # "intra_op_parallelism_threads=1", which many recipes have.
        os.environ["XLA_FLAGS"] = " ".join([*missing, given]).strip()
        lines.append(f"set XLA_FLAGS={os.environ['XLA_FLAGS']}")
    # Batched MuJoCo steps can deadlock in a thread pool of two.
    if "PJRT_NPROC" not in os.environ and (os.cpu_count() or 1) < _MIN_THREADS:
        os.environ["PJRT_NPROC"] = str(_MIN_THREADS)
        lines.append(f"set PJRT_NPROC={_MIN_THREADS}")
    if _keep_freed_memory():
        lines.append("set mallopt: freed memory is kept for reuse (MALLOC_ARENA_MAX=0 to leave it)")
    return lines


def _has_accelerator() -> bool:
    """JAX's package for a GPU or TPU is installed. Asking JAX itself would start it."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    packages = ("jax_plugins", "libtpu")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in packages)


def _keep_freed_memory() -> bool:
    """Lets glibc keep freed memory instead of returning it to the kernel.

    XLA on CPU allocates each call's temporaries anew. Above 32 MiB glibc maps and unmaps
    them every time, and page faults then take a quarter of a training step.
    """
    has_own = any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or has_own or "GLIBC_TUNABLES" in os.environ:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
