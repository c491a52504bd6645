"""What importing the package does, and what its modules may import and call."""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import jaxvla

_PACKAGE = pathlib.Path(jaxvla.__file__).parent
_FILES = sorted(_PACKAGE.rglob("*.py"))

_LAYERS = (
    ("main", "compare"),
    ("runtime", "scaling"),
    ("simulation", "serving", "learning", "evaluation"),
    ("envs", "models", "algorithms", "data", "transport"),
    ("sharding", "checkpoint", "telemetry"),
    ("multihost",),
    (
        *(
            "types",
            "config",
            "config_data",
            "validation",
            "layout",
            "assignment",
            "endpoint",
            "segments",
        ),
        "cluster",
        *("registry", "rng"),
    ),
)
"""Imports go down this table. Neighbours of a row do not import each other."""

_FOUNDATIONS = _LAYERS[-1]
"""The lowest row is one unit: plain definitions that build on each other."""

_NEIGHBOURS = {
    ("jaxvla.scaling.sweep_job", "runtime"): "a sweep's trials are runs, and checked as runs are",
    ("jaxvla.checkpoint", "sharding"): "leaves are named as in sharding rules",
    ("jaxvla.models.openpi_format", "data"): "openpi's checkpoints hold norm_stats.json",
    ("jaxvla.simulation.simulator", "serving"): "a simulator is a client of the policy server",
    ("jaxvla.evaluation.evaluator", "serving"): "evaluates with the server's sampling functions",
    ("jaxvla.evaluation.evaluator", "simulation"): "steps an env group without a simulator",
}
"""The exceptions: (module, neighbour that it imports) -> why."""

_CONFINED = {
    "libero": ("envs/libero_",),
    "robosuite": ("envs/libero_",),
    "h5py": ("data/libero_hdf5.py",),
    "pyarrow": ("data/lerobot",),
    "av": ("data/video_reader.py",),
    "wandb": ("telemetry/writers.py",),
    "safetensors": ("models/openpi_torch.py",),
    "tensorboardX": ("telemetry/writers.py",),
    "sentencepiece": ("models/tokenizer.py",),
    "tokenizers": ("models/tokenizer.py",),
    "msgpack": ("serving/wire.py", "transport/frames.py"),
    "websockets": ("serving/websocket.py",),
    "pickle": ("envs/libero_init_states.py",),  # a restricted unpickler
    "ray": ("runtime/ray_",),
    "simpy": ("scaling/simulate",),
    "torch": (),
    "tensorflow": (),
    "dill": (),
    "cloudpickle": (),
    "shelve": (),
    "marshal": (),
}
"""Package -> the only files that may import it, as prefixes of paths."""


def _module(file: pathlib.Path) -> str:
    parts = file.relative_to(_PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str | None:
    """The entry of the layer table that a module belongs to; None for jaxvla itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


@functools.cache
def _nodes(file: pathlib.Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(file.read_text())))


def _imports(file: pathlib.Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    for node in _nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _calls(file: pathlib.Path) -> Iterator[str]:
    """Names that a file calls: `f(...)` gives "f", `a.b.f(...)` gives "a.b.f"."""
    for node in _nodes(file):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def _row(unit: str) -> int:
    return next(index for index, row in enumerate(_LAYERS) if unit in row)


@pytest.mark.parametrize("file", _FILES, ids=_module)
def test_imports_go_down(file: pathlib.Path):
    module = _module(file)
    unit = _unit(module)
    for name in _imports(file):
        if name.split(".")[0] != "jaxvla":
            continue
        imported = _unit(name)
        assert imported is not None, f"{module} imports jaxvla itself"
        assert unit is not None, f"jaxvla/__init__.py imports {name}"
        if imported == unit or {unit, imported} <= set(_FOUNDATIONS):
            continue
        if (module, imported) in _NEIGHBOURS:
            continue
        assert _row(imported) > _row(unit), f"{module} imports {name}"


def test_the_exceptions_are_needed():
    used = {(_module(file), _unit(name)) for file in _FILES for name in _imports(file)}
    assert set(_NEIGHBOURS) <= used


def test_packages_that_are_optional_or_dangerous_stay_confined():
    for file in _FILES:
        path = file.relative_to(_PACKAGE).as_posix()
        for name in _imports(file):
            allowed = _CONFINED.get(name.split(".")[0])
            assert allowed is None or path.startswith(allowed), f"{path} imports {name}"


@pytest.mark.parametrize("name", ["print", "eval", "exec", "compile", "__import__", "os.system"])
def test_forbidden_calls(name: str):
    callers = [_module(file) for file in _FILES if name in _calls(file)]
    assert callers == []


def test_no_shell_and_no_unrestricted_unpickling():
    for file in _FILES:
        calls = set(_calls(file))
        unpickling = {f"pickle.{x}" for x in ("load", "loads", "Unpickler")}
        assert not calls & unpickling, _module(file)
        assert "shell=True" not in file.read_text(), _module(file)


# ------------------------------------------------------------------- effects of imports

_REPORT = """
import importlib, json, os, sys, threading
before = dict(os.environ)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps({
    "modules": sorted(sys.modules),
    "changed": sorted(n for n in {**before, **os.environ} if before.get(n) != os.environ.get(n)),
    "threads": [x.name for x in threading.enumerate()],
}))
"""


def _import_in_a_process(modules: list[str], **environment: str) -> dict[str, list[str]]:
    """What a fresh interpreter looks like after importing modules."""
    done = subprocess.run(
        [sys.executable, "-c", _REPORT, json.dumps(modules)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_configs_and_the_command_line_load_without_jax():
    light = ["", ".config", ".validation", ".layout", ".registry", ".telemetry", ".envs", ".models"]
    light += [".algorithms", ".main", ".runtime.cpu_settings", ".telemetry.writers"]
    light += [".endpoint", ".serving.wire", ".transport.frames", ".transport.channel"]
    light += [".compare", ".telemetry.report"]
    light += [".envs.host_worker"]  # imported by every worker process
    found = _import_in_a_process([f"jaxvla{name}" for name in light])
    assert not {"jax", "jaxlib", "flax", "mujoco"} & set(found["modules"])


def test_importing_everything_starts_no_backend_and_changes_no_setting():
    everything = [_module(file) for file in _FILES]
    # A backend that does not exist: starting one would raise.
    found = _import_in_a_process(everything, JAX_PLATFORMS="no_such_platform")
    assert "jax" in found["modules"]
    by_jax = {"TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"}
    assert set(found["changed"]) <= by_jax
    assert found["threads"] == ["MainThread"]
