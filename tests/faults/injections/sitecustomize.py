"""Breaks a program of a run: Python loads this in every process whose PYTHONPATH has the directory.

With the environment variable FAULT_DIRECTORY, the policy server raises instead of answering one of
its batches, once in the run: the file "raised" there then says when, in monotonic seconds, and
which process.
"""

import importlib.abc
import importlib.util
import os
import pathlib
import sys
import time
from typing import Any

MODULE = "jaxvla.serving.server"
NUM_GOOD = 20
"""Batches that are answered before."""


class _Patcher(importlib.abc.MetaPathFinder):
    """Changes the module as soon as it is loaded, whoever imports it first."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            _break(module.PolicyServer)

        spec.loader.exec_module = exec_module
        return spec


def _break(server: Any) -> None:
    answers, batches = server._answers, []
    path = pathlib.Path(os.environ["FAULT_DIRECTORY"]) / "raised"

    def raising(self: Any, batch: Any) -> Any:
        batches.append(batch.rows)
        if len(batches) > NUM_GOOD and not path.exists():
            path.write_text(f"{time.monotonic()} {os.getpid()}")
            raise ArithmeticError("injected into the policy server")
        return answers(self, batch)

    server._answers = raising


if "FAULT_DIRECTORY" in os.environ:
    sys.meta_path.insert(0, _Patcher())
