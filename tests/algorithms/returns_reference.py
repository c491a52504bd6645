"""Advantages and value targets in float64, written as the sums that define them."""

from typing import Any

import numpy as np

Arrays = dict[str, Any]


def following_value(arrays: Arrays, t: int, b: int) -> float:
    """V of the observation after step t of the same episode; 0 after a true end."""
    if arrays["terminated"][t, b]:
        return 0.0
    if arrays["truncated"][t, b] or t == len(arrays["reward"]) - 1:
        return float(arrays["bootstrap_value"][t, b])
    return float(arrays["value"][t + 1, b])


def reference(arrays: Arrays, discount: float, trace_decay: float) -> np.ndarray:
    """A_t = sum_k (gamma lambda)^(k-t) delta_k over the steps k of t's episode, in float64."""
    T, B = arrays["reward"].shape
    result = np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            for k in range(t, T):
                if not arrays["valid"][k, b]:
                    break
                reward, value = float(arrays["reward"][k, b]), float(arrays["value"][k, b])
                delta = reward + discount * following_value(arrays, k, b) - value
                result[t, b] += (discount * trace_decay) ** (k - t) * delta
                if arrays["terminated"][k, b] or arrays["truncated"][k, b]:
                    break
    return result


def vtrace_reference(
    arrays: Arrays, discount: float, trace_decay: float, rho_cap: float, trace_cap: float
) -> tuple[np.ndarray, np.ndarray]:
    """(A, v) of Espeholt et al. 2018, eq. 1; an error of step k reaches t by the steps between."""
    T, B = arrays["reward"].shape
    advantage, v = np.zeros((T, B)), arrays["value"].astype(np.float64)
    for b in range(B):
        for t in reversed(range(T)):
            passed = 1.0
            for k in range(t, T):
                if not arrays["valid"][k, b]:
                    break
                reward, value = float(arrays["reward"][k, b]), float(arrays["value"][k, b])
                delta = reward + discount * following_value(arrays, k, b) - value
                ratio = np.exp(float(arrays["log_ratio"][k, b]))
                v[t, b] += discount ** (k - t) * passed * min(rho_cap, ratio) * delta
                if arrays["terminated"][k, b] or arrays["truncated"][k, b]:
                    break
                passed *= trace_decay * min(trace_cap, ratio)
            if arrays["valid"][t, b]:
                is_end = arrays["terminated"][t, b] or arrays["truncated"][t, b] or t == T - 1
                plain = following_value(arrays, t, b)
                later = plain if is_end else (1 - trace_decay) * plain + trace_decay * v[t + 1, b]
                target = float(arrays["reward"][t, b]) + discount * later
                advantage[t, b] = target - float(arrays["value"][t, b])
    return advantage, v
