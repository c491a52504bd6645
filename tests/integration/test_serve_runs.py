"""The serve job as a process: signals, and openpi's client on the other end."""

import pathlib
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from integration.run_process import ROOT, RunProcess

from jaxvla import main
from jaxvla.runtime.build import Parts, draw_blueprint

_INSTALL = "scripts/environment.sh installs it with the openpi extra"
openpi: Any = pytest.importorskip("openpi_client.websocket_client_policy", reason=_INSTALL)
exceptions: Any = pytest.importorskip("websockets.exceptions", reason=_INSTALL)

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:connect:DeprecationWarning"),
]
TIMEOUT_S = 300.0
REQUEST = {
    "observation/image": np.zeros((48, 64, 3), np.uint8),
    "observation/wrist_image": np.zeros((48, 64, 3), np.uint8),
    "observation/state": None,
    "prompt": "reach the red block",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With a checkpoint of the debug config, untrained."""
    path = tmp_path_factory.mktemp("run")
    blueprint = draw_blueprint(main.load_config(str(ROOT / "configs" / "debug.py")))
    parts = Parts(blueprint)
    params = parts.fresh_params(parts.training(parts.config.optimizer))
    checkpointer = blueprint.checkpointer(path)
    checkpointer.save(7, {"state": {"params": params}}, {"segments": {}})
    checkpointer.close()
    REQUEST["observation/state"] = np.zeros(blueprint.spec.state_dim)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_with_all_requests_answered(
    workdir: pathlib.Path, which: signal.Signals
) -> None:
    token = "s3cret"
    (workdir / "token").write_text(token + "\n")
    run = RunProcess(
        workdir,
        "--job=serve",
        "--config.websocket.port=0",
        "--config.websocket.host=0.0.0.0",
        f"--config.websocket.token_file={workdir / 'token'}",
        "--config.websocket.buckets=(1,4)",
    )
    port = int(re.search(r":(\d+),", run.until(r"^ready +ws://0\.0\.0\.0:"))[1])  # pyright: ignore
    with pytest.raises(exceptions.InvalidStatus):
        openpi.WebsocketClientPolicy("127.0.0.1", port)
    policies = [openpi.WebsocketClientPolicy("127.0.0.1", port, token) for _ in range(3)]
    assert policies[0].get_server_metadata()["update"] == 7
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda policy: policy.infer(REQUEST), policies))
        assert all(answer["actions"].shape == (8, 4) for answer in answers)
        with pytest.raises(RuntimeError, match="the request has no 'prompt'"):
            policies[0].infer({k: v for k, v in REQUEST.items() if k != "prompt"})
        last = pool.submit(policies[1].infer, REQUEST)
        last.result(TIMEOUT_S)
        run.send(which)
        run.expect(0)
    with pytest.raises(exceptions.ConnectionClosed):
        policies[2].infer(REQUEST)
    assert re.fullmatch(r"served 5 requests, 1 of them with errors, in \S+", run.lines[-1])
    assert any(re.match(r"[\d.]+ requests/s \| latency p50 ", line) for line in run.lines)
    assert not any("Traceback" in line for line in run.lines)
