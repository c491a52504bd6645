"""Work directories with known contents."""

import json
import math

CONFIG = {
    "name": "tiny",
    "learning": {"num_updates": 10},
    "schedule": {"max_staleness": 2},
    "model": {"initial_weights": ""},
}
EVALUATED = {
    "eval/success_rate": 0.25,
    "eval/ci95_low": 0.1,
    "eval/ci95_high": 0.5,
    "eval/episodes": 16,
    "eval/success_rate/reach": 0.375,
    "eval/success_rate/push <it>": 0.125,
}
AFTER = EVALUATED | {"eval/success_rate": 0.75, "eval/success_rate/reach": 0.875}


def record(update, **changes):
    """A record with the values that most charts show; `a__b=c` sets a/b."""
    values = {
        "update": update,
        "time_s": 100.0 + 2.0 * update,
        "learner/loss/total": 0.5 / update,
        "learner/loss/policy": 0.1 / update,
        "learner/approx_kl": 0.01,
        "rate/env_steps_per_s": 1000.0 * update,
        "rate/useful_env_steps_per_s": 1000.0 * update,
        "rate/updates_per_s": 0.5,
        "train/success_rate": 0.05 * update,
        "queue/depth": update % 3,
        "queue/staleness/mean": 1.5,
        "queue/staleness/max": 2,
        "queue/staleness/bound": 2,
        "serving/latency_ms/p50": 10.0,
        "serving/latency_ms/p95": 20.0,
        "serving/latency_ms/p99": 30.0,
        "faults/invalid_samples": 0,
        "utilisation/simulation/busy_fraction": 0.75,
        "utilisation/simulation/waiting_on/inference_fraction": 0.25,
        "utilisation/learning/busy_fraction": 0.5,
        "utilisation/learning/waiting_on/trajectories_fraction": 0.5,
    }
    return values | {name.replace("__", "/"): value for name, value in changes.items()}


SUMMARY = {
    "outcome": "finished",
    "detail": "",
    "update": 10,
    "time_s": 125.0,
    "max_staleness": 2,
    "staleness_bound": 2,
    "staleness_counts": {"0": 3, "1": 10, "2": 7},
    "ledger_closes": True,
    "evaluation_before": EVALUATED,
    "evaluation_after": AFTER,
    "utilisation": {
        "simulation": {"busy_fraction": 0.7, "waiting_on": {"inference": 0.3}},
        "serving": {"busy_fraction": None, "waiting_on": {}},
        "learning": {"busy_fraction": 0.4, "waiting_on": {"trajectories": 0.6}},
    },
    "totals": {"faults/invalid_samples": 0, "queue/dropped": 0},
}


def write_run(workdir, *, records=None, summary=SUMMARY, config=CONFIG, versions=None):
    """Writes the three main files; None leaves one out. Returns the directory."""
    workdir.mkdir(parents=True, exist_ok=True)
    records = [record(i) for i in range(1, 11)] if records is None else records
    with (workdir / "metrics.jsonl").open("w") as file:
        for values in records:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()
            }
            file.write(json.dumps(finite) + "\n")
    if summary is not None:
        (workdir / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        provenance = {"config": config, "git_commit": None, "python": "3.11.7"}
        provenance |= {"versions": versions or {"jax": "0.10.2"}, "devices": ["cpu:0"]}
        (workdir / "config.json").write_text(json.dumps(provenance))
    return workdir
