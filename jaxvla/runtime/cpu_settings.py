"""Process settings that JAX on CPU needs before it is imported. No jax here.

Called by the entry point only: importing jaxvla changes no process setting. A setting that
the user has made is left alone. On an accelerator host they concern JAX's CPU backend only.
"""

import ctypes
import os
import platform

_FUSION_FLAG = "--xla_cpu_use_fusion_emitters"
_MIN_THREADS = 8
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of mallopt (https://man7.org/linux/man-pages/man3/mallopt.3.html)."""


def apply() -> list[str]:
    """Makes the settings; returns one line per setting made."""
    lines = []
    # With the fusion emitters one step of a MuJoCo scene takes seconds instead of
    # milliseconds (jaxlib 0.10.2): the kinematic chain is recomputed in every consumer.
    if _FUSION_FLAG not in os.environ.get("XLA_FLAGS", ""):
        flags = f"{os.environ.get('XLA_FLAGS', '')} {_FUSION_FLAG}=false".strip()
        os.environ["XLA_FLAGS"] = flags
        lines.append(f"set XLA_FLAGS={flags}")
    # Batched MuJoCo steps can deadlock in a thread pool of two.
    if "PJRT_NPROC" not in os.environ and (os.cpu_count() or 1) < _MIN_THREADS:
        os.environ["PJRT_NPROC"] = str(_MIN_THREADS)
        lines.append(f"set PJRT_NPROC={_MIN_THREADS}")
    if _keep_freed_memory():
        lines.append("set mallopt: freed memory is kept for reuse (MALLOC_ARENA_MAX=0 to leave it)")
    return lines


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
