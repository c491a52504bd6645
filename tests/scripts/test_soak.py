"""A short soak of a real run."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "soak.py"
SHORT = (
    "--config.warm_start.num_steps=0",
    "--config.warm_start.num_grounding_steps=0",
    "--config.evaluation.num_episodes=0",
)


def test_every_kind_of_process_is_killed_and_everything_holds(tmp_path: pathlib.Path):
    out = tmp_path / "soak.json"
    options = ("--minutes=1.5", "--pause_s=2", "--silence_s=20", "--hangs=0.3", "--seed=3")
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *options, *SHORT, f"--json={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1700,
    )
    assert process.returncode == 0, process.stdout
    report = json.loads(out.read_text())
    assert report["kills"] and all(x["recovered_s"] >= 0 for x in report["kills"])
    assert all(check["holds"] for check in report["checks"])
    assert "FAILED" not in process.stdout
