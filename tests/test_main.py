"""The command line: every mistake is answered in one line, before anything is started."""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from fault_rows import FaultRow

from jaxvla import main
from jaxvla.checkpoint import Checkpointer
from jaxvla.config import to_dict
from jaxvla.envs.tabletop import Tabletop

_ROOT = pathlib.Path(__file__).parents[1]
_DEBUG = f"--config={_ROOT / 'configs' / 'debug.py'}"

_CONFIG_FILES = {
    "raises.py": "def get_config():\n    x = 1\n    return x / 0\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "other.py": "def get_config():\n    return {'name': 'x'}\n",
    "imports.py": "import no_such_package\n",
}

_C = "--config."
_MISTAKES = {
    # what is wrong: (arguments after the program's name, parts of the one line)
    "no config": ("", "--config is missing"),
    "missing file": ("--config=nowhere.py", "there is no file nowhere.py"),
    "directory": ("--config=.", "there is no file ."),
    "file raises": ("--config=raises.py", "raises.py: ZeroDivisionError, line 3: division by zero"),
    "file with a syntax error": ("--config=syntax.py", "syntax.py: SyntaxError"),
    "file without get_config": ("--config=empty.py", "empty.py: KeyError: 'get_config'"),
    "file of another kind": ("--config=other.py", "returned dict, want an ExperimentConfig"),
    "file that imports what is missing": (
        "--config=imports.py",
        "ModuleNotFoundError, line 1: No module named 'no_such_package'",
    ),
    "unknown flag": (f"{_DEBUG} --wrkdir=x", "unknown flag --wrkdir (did you mean '--workdir'?)"),
    "unknown job": (f"{_DEBUG} --job=trian", "--job=trian", "train|finetune|evaluate"),
    "a judge of training": (f"{_DEBUG} --judge", "--judge: job 'train'", "Fix: --job=evaluate"),
    "tasks of an env that has none": (
        f"{_DEBUG} --job=compile_tasks",
        "config.env.name = 'tabletop': has no tasks to compile",
        "Fix: --config.env.name=libero_mjx",
    ),
    "stray argument": (f"{_DEBUG} seed=1", "unexpected argument 'seed=1'"),
    "unknown setting": (
        f"{_DEBUG} {_C}optimizer.learning_rat=0.1",
        "config.optimizer.learning_rat = '0.1': no such setting",
        "fields of optimizer: learning_rate, value_learning_rate",
        "Fix: did you mean --config.optimizer.learning_rate=0.1 ?",
    ),
    "unknown section": (f"{_DEBUG} {_C}optimzer.eps=1", "--config.optimizer.eps=1"),
    "section for setting": (f"{_DEBUG} {_C}env=x", "config.env = 'x': is a section, not a setting"),
    "word for number": (f"{_DEBUG} {_C}seed=one", "config.seed = 'one': must be an integer"),
    "fraction for number": (f"{_DEBUG} {_C}seed=1.5", "config.seed = '1.5': must be an integer"),
    "word for bool": (
        f"{_DEBUG} {_C}schedule.overlap_rollout=perhaps",
        "config.schedule.overlap_rollout = 'perhaps': must be True or False",
    ),
    "infinite rate": (
        f"{_DEBUG} {_C}optimizer.learning_rate=inf",
        "config.optimizer.learning_rate = inf: must be a finite",
    ),
    "negative staleness": (
        f"{_DEBUG} {_C}schedule.max_staleness=-1",
        "config.schedule.max_staleness = -1: must be >= 0",
    ),
    "publishing too rarely": (
        f"{_DEBUG} {_C}schedule.publish_interval=3",
        "config.schedule.publish_interval = 3: must be <= max_staleness in force + 1 = 2",
        "Fix: --config.schedule.publish_interval=2",
    ),
    "publishing too rarely without overlap": (
        f"{_DEBUG} {_C}schedule.publish_interval=2 {_C}schedule.overlap_training=False",
        "must be <= max_staleness in force + 1 = 1",
    ),
    "chunk longer than horizon": (
        f"{_DEBUG} {_C}env.num_executed=9",
        "config.env.num_executed = 9: must be <= model.action_horizon = 8",
    ),
    "batch does not divide": (
        f"{_DEBUG} {_C}meshes.layout='simulation=3 serving=1 learning=1'",
        "config.simulation.envs_per_group = 8: must be a multiple of the simulation mesh's data",
        "Fix: --config.simulation.envs_per_group=6",
    ),
    "learning batch does not divide": (
        f"{_DEBUG} {_C}meshes.layout='simulation=1 serving=1 learning=6:fsdp3'",
        "must be a multiple of the learning mesh's data x fsdp = 6",
    ),
    "minibatches do not divide": (
        f"{_DEBUG} {_C}algorithm.num_minibatches=3",
        "config.algorithm.num_minibatches = 3: must divide simulation.segment_length = 4",
    ),
    "malformed layout": (
        f"{_DEBUG} {_C}meshes.layout=colocated=8:pipe2",
        "config.meshes.layout = 'colocated=8:pipe2': colocated has no axis 'pipe'",
    ),
    "buckets too small": (
        f"{_DEBUG} {_C}serving.buckets='(2,4)'",
        "config.serving.buckets = (2, 4): the largest must hold serving.max_batch = 8 rows",
        "Fix: --config.serving.buckets='(8,)'",
    ),
    "buckets out of order": (f"{_DEBUG} {_C}serving.buckets='(8,4)'", "must ascend"),
    "too many buckets": (
        f"{_DEBUG} {_C}serving.max_batch=1000000000",
        "config.serving.buckets = (): must be given: the default would compile 125000000",
    ),
    "streaming with epochs": (
        f"{_DEBUG} {_C}schedule.stream_microbatches=True",
        "config.algorithm.num_epochs = 2: must be 1 with schedule.stream_microbatches",
    ),
    "another plug-in's settings": (
        f"{_DEBUG} {_C}env.name=libero_host",
        "config.env.name = 'libero_host': the config file has settings for 'tabletop'",
    ),
    "plug-in that is not there": (
        f"{_DEBUG} {_C}env.name=no_such_package:Env",
        "config.env.name = 'no_such_package:Env'",
        "cannot be imported",
    ),
    "same task twice": (
        f"{_DEBUG} {_C}env.tasks=\"('reach','reach')\"",
        "config.env.tasks = ('reach', 'reach'): must name each one once",
        "Fix: --config.env.tasks=\"('reach',)\"",
    ),
    "no task": (f"{_DEBUG} {_C}env.tasks='()'", "config.env.tasks = (): tasks are reach, push"),
    "value head of width 0": (
        f"{_DEBUG} {_C}model.value_widths='(16,0)'",
        "config.model.value_widths = (16, 0): each must be in [1, 2**31)",
        "Fix: --config.model.value_widths='(16,)'",
    ),
    "head that cannot be split": (
        f"{_DEBUG} {_C}model.vision_heads=3",
        "config.model.vision_heads = 3: must divide model.vision_width = 32",
    ),
    "unknown task": (f"{_DEBUG} {_C}env.tasks=\"('fly',)\"", "tasks are reach, push, lift"),
    "unknown writer": (
        f"{_DEBUG} {_C}telemetry.writers=\"('tensorbord',)\"",
        "config.telemetry.writers = ('tensorbord',)",
        "did you mean 'tensorboard'?",
    ),
    "bad regular expression": (
        f"{_DEBUG} {_C}optimizer.trainable='('",
        "config.optimizer.trainable = '(': must be a regular expression",
    ),
    "workdir is a file": (f"{_DEBUG} --workdir=empty.py", "empty.py: is not a directory"),
    "not resuming a used workdir": (
        f"{_DEBUG} --workdir=used --noresume",
        "--workdir=used: is not empty and --noresume was given. Fix: --workdir=NEW_DIR",
    ),
    "nothing to evaluate": (
        f"{_DEBUG} --workdir=used --job=evaluate",
        "--workdir=used: holds no checkpoints to evaluate. Fix: run --job=train",
    ),
    "nothing to serve": (
        f"{_DEBUG} --workdir=used --job=serve",
        "--workdir=used: holds no checkpoints to serve. Fix: run --job=train",
    ),
    "serving other machines without a token": (
        f"{_DEBUG} --job=serve {_C}websocket.host=0.0.0.0",
        "config.websocket.host = '0.0.0.0': can be reached from other machines",
        "Fix: --config.websocket.host=127.0.0.1",
    ),
    "sweep of a judge": (f"{_DEBUG} --job=sweep --judge", "--judge: job 'sweep' has no judge"),
    "sweep without repeats": (
        f"{_DEBUG} --job=sweep {_C}sweep.repeats=0",
        "config.sweep.repeats = 0: must be > 0",
    ),
    "sweep of no setting": (
        f"{_DEBUG} --job=sweep {_C}sweep.host_devices=2 {_C}sweep.axes=simulation.num_group=1",
        "config.sweep.axes = ('simulation.num_group=1',): there is no setting",
        "did you mean 'simulation.num_groups'?",
    ),
    "sweep of a value of the wrong type": (
        f"{_DEBUG} --job=sweep {_C}sweep.host_devices=2 {_C}sweep.axes=seed=one",
        "config.seed = 'one': must be an integer",
    ),
    "sweep of too many devices": (
        f"{_DEBUG} --job=sweep {_C}sweep.host_devices=2 {_C}sweep.layouts=colocated=4",
        "config.sweep.layouts = ('colocated=4',): 'colocated=4' needs 4 devices, trials have 2",
        "Fix: --config.sweep.layouts=\"('colocated=2',)\", or on CPU --config.sweep.host_devices=4",
    ),
    "sweep in a used workdir": (
        f"{_DEBUG} --job=sweep --workdir=used --noresume",
        "--workdir=used: is not empty and --noresume was given",
    ),
    "sweep of devices that are not there": (
        f"{_DEBUG} --job=sweep",
        "JAX has no devices: ",
        "no_such_platform",
    ),
    "evaluating a layout that is still to be chosen": (
        f"{_DEBUG} --job=evaluate {_C}meshes.layout=auto",
        "config.meshes.layout = 'auto': only a run of --job=train chooses a layout",
    ),
    "platform that is not there": (_DEBUG, "JAX has no devices: ", "no_such_platform", "Fix: "),
}

_ANY_PORT = "--config.websocket.port=0"

_CHILD = """
import contextlib, io, json, sys
from jaxvla import main
results = {}
for name, argv in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["jaxvla", *argv])
    results[name] = [code, out.getvalue(), err.getvalue()]
json.dump(results, sys.stdout)
"""


def _listing(directory: pathlib.Path) -> list[str]:
    return sorted(str(x.relative_to(directory)) for x in directory.rglob("*"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr for every mistake.

    All from one process in which starting a JAX backend fails, and that must write nothing.
    """
    directory = tmp_path_factory.mktemp("cwd")
    for name, text in _CONFIG_FILES.items():
        (directory / name).write_text(text)
    (directory / "used").mkdir()
    (directory / "used" / "notes.txt").write_text("x")
    before = _listing(directory)
    paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-B", "-c", _CHILD],
        input=json.dumps({name: shlex.split(x[0]) for name, x in _MISTAKES.items()}),
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": paths},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert _listing(directory) == before
    return json.loads(done.stdout)


@pytest.mark.fault(29)
@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    answers: dict[str, tuple[int, str, str]], mistake: str, fault_row: FaultRow
):
    code, out, err = answers[mistake]
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in out + err
    for part in _MISTAKES[mistake][1:]:
        assert part in err
    if err.startswith("error: config."):
        assert "Fix: " in err
    fault_row(survived=True, exit_code=code)


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty working directory; the allocator of this process is left alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "0")
    return tmp_path


def _main(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["jaxvla", *arguments])
    return code, out.getvalue(), err.getvalue()


def test_help(place: pathlib.Path):
    for flag in ("--help", "-h"):
        code, out, err = _main(flag)
        assert (code, err) == (0, "")
        for word in ("--workdir", "--job", "--dry_run", "Exit codes", "--config.section.field"):
            assert word in out
    assert _listing(place) == []


def test_a_dry_run_prints_the_plan_and_writes_nothing(place: pathlib.Path):
    layout = "simulation=2 serving=2 learning=4:data2,fsdp2"
    code, out, err = _main(_DEBUG, "--dry_run", f"--config.meshes.layout={layout}")
    assert (code, err) == (0, "")
    assert _listing(place) == []
    config, _, plan = out.partition("\n\n")
    resolved = json.loads(config)
    assert resolved["meshes"]["layout"] == layout
    assert resolved["serving"]["buckets"] == [8] and resolved["serving"]["trigger_size"] == 8
    for part in (
        "disaggregated",
        "learning   devices 4-7, data2,fsdp2,tensor1",
        "2 trajectories x 8 envs x 4 chunk queries = 64 samples per update",
        "2 epochs x 2 minibatches of 32 samples",
        "staleness  bound 1, published every 1",
        "queue      at most 4 trajectories of ",
        "1 policy server, round_robin; buckets (8,), trigger 8 rows",
        "leaves are split over devices:",
    ):
        assert part in plan
    assert " share devices" not in plan


def test_a_dry_run_says_who_shares_devices_and_who_answers_whom(place: pathlib.Path):
    code, out, err = _main(
        _DEBUG,
        "--dry_run",
        "--config.meshes.layout=simulation=1@3 serving=4@0 learning=2@4",
        "--config.serving.num_servers=2",
        "--config.serving.split_devices",
        "--config.serving.assignment=1,0,1",
        "--config.simulation.num_groups=3",
        "--config.schedule.window=4",
    )
    assert (code, err) == (0, "")
    plan = out.partition("\n\n")[2].splitlines()
    for line in (
        "layout     simulation=1@3 serving=4@0 learning=2@4 (hybrid), 8 devices present",
        "  simulation + serving share devices 3",
        "  server_0   devices 0-1, data2,tensor1, answers group_1",
        "  server_1   devices 2-3, data2,tensor1, answers group_0, group_2",
        "staleness  bound 3 (max_staleness 1, window 4), published every 1",
    ):
        assert line in plan, out
    assert sum(" share devices" in line for line in plan) == 1


def test_a_dry_run_says_how_the_learner_is_spread_over_processes(place: pathlib.Path):
    code, out, err = _main(
        _DEBUG,
        "--dry_run",
        "--config.meshes.layout=simulation+serving=4@0 learning=8@0",
        "--config.runtime.kind=processes",
        "--config.runtime.learner_processes=2",
        "--config.warm_start.num_steps=0",
        "--config.warm_start.num_grounding_steps=0",
    )
    assert (code, err) == (0, "")
    assert "  learning is spread over 2 processes of 4 devices" in out.splitlines()


def test_a_dry_run_plans_for_devices_that_are_not_there(place: pathlib.Path):
    settings = (
        "--config.simulation.envs_per_group=512",
        "--config.serving.max_batch=512",
        "--config.learning.num_microbatches=2",
        "--config.warm_start.num_steps=0",
        "--config.warm_start.num_grounding_steps=0",
    )

    def mib(layout: str) -> list[float]:
        code, out, err = _main(_DEBUG, "--dry_run", f"--config.meshes.layout={layout}", *settings)
        assert (code, err) == (0, "")
        return [float(x) for x in re.findall(r"(\d+\.\d) MiB per learning device", out)]

    # Parameters, gradients and optimizer state over fsdp; activations over all.
    few, many = mib("colocated=4:data2,fsdp2"), mib("colocated=256:data8,fsdp32")
    assert len(few) == len(many) == 4
    assert all(b < a for a, b in zip(few, many, strict=True))
    assert many[3] == pytest.approx(few[3] / 64, rel=0.2)
    assert _listing(place) == []


def test_more_devices_than_there_are(place: pathlib.Path):
    sizes = ("--config.simulation.envs_per_group=16", "--config.serving.max_batch=16")
    code, _, err = _main(_DEBUG, "--config.meshes.layout=colocated=16", *sizes)
    assert code == 2
    assert "config.meshes.layout = 'colocated=16': needs 16 devices, 8 present. Fix: " in err
    assert err.count("\n") == 1 and _listing(place) == []


def test_devices_are_counted_before_an_env_is_made(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """An env may put its physics on a device."""
    made = []
    monkeypatch.setattr(Tabletop, "__init__", lambda self, config: made.append(config))
    sizes = ("--config.simulation.envs_per_group=16", "--config.serving.max_batch=16")
    code, _, err = _main(_DEBUG, "--config.meshes.layout=colocated=16", *sizes)
    assert code == 2 and "needs 16 devices, 8 present" in err
    assert made == []


@pytest.mark.parametrize("job", ["train", "evaluate", "serve"])
def test_a_checkpoint_of_another_tokenizer_is_refused(place: pathlib.Path, job: str):
    path = place / "run" / "checkpoints"
    checkpointer = Checkpointer(path, keep=2, identity={"tokenizer": "words-7"})
    checkpointer.save(1, {"w": np.zeros(3, np.float32)}, {"segments": {}})
    checkpointer.close()
    code, _, err = _main(_DEBUG, "--workdir=run", f"--job={job}", _ANY_PORT)
    assert code == 2 and err.count("\n") == 1
    assert "another tokenizer: 'words-7' in it, 'byte-260' now. Fix: " in err


@pytest.mark.parametrize("job", ["train", "evaluate", "serve"])
def test_a_checkpoint_of_other_settings_is_refused_before_anything_is_written(
    place: pathlib.Path, job: str
):
    arrays = {"state": {"params": {"w": np.zeros(3, np.float32)}}}
    checkpointer = Checkpointer(place / "run" / "checkpoints", keep=2)
    checkpointer.save(1, arrays, {"segments": {}})
    checkpointer.close()
    before = _listing(place)
    code, _, err = _main(_DEBUG, "--workdir=run", f"--job={job}", _ANY_PORT)
    assert code == 2 and err.count("\n") == 1
    assert "was made with other settings: state/params/w is float32 [3] in it, absent now" in err
    assert _listing(place) == before


def test_an_optimizer_that_trains_nothing_is_refused(place: pathlib.Path):
    code, _, err = _main(_DEBUG, "--config.optimizer.trainable=no_such_leaf")
    assert code == 2 and _listing(place) == []
    assert "config.optimizer.trainable = 'no_such_leaf': matches no parameter" in err


def test_an_encoder_that_is_trained_cannot_be_run_once_per_update(place: pathlib.Path):
    code, _, err = _main(_DEBUG, "--config.learning.encode_once=True")
    assert code == 2 and _listing(place) == []
    assert "config.learning.encode_once = True: the encoder must be frozen" in err


def test_settings_of_every_kind_can_be_overridden():
    arguments = (
        "--config.seed=7",
        "--config.optimizer.learning_rate=1e-2",
        "--config.schedule.overlap_rollout=False",
        "--noconfig.schedule.overlap_training",
        "--config.serving.buckets=(8, 16)",
        "--config.env.tasks=('lift',)",
        "--config.name=other",
        "--config.warm_start.optimizer.warmup_steps=3",
    )
    _, config = main.parse(["jaxvla", _DEBUG, *arguments])
    assert config is not None
    assert config.seed == 7 and config.optimizer.learning_rate == 1e-2
    assert not config.schedule.overlap_rollout and not config.schedule.overlap_training
    assert config.serving.buckets == (8, 16) and to_dict(config.env)["tasks"] == ["lift"]
    assert config.name == "other" and config.warm_start.optimizer.warmup_steps == 3
    assert config.optimizer.warmup_steps == 0  # the other optimizer's


def test_the_last_of_two_settings_with_one_name_counts():
    given = ("--config.serving.buckets=(8,)", "--config.seed=1", "--config.env.tasks=('lift',)")
    later = ("--config.seed=2", "--config.serving.buckets=(16, 32)", "--config.env.tasks=()")
    _, config = main.parse(["jaxvla", _DEBUG, *given, *later])
    assert config is not None
    assert config.seed == 2 and config.serving.buckets == (16, 32)
    assert to_dict(config.env)["tasks"] == []


def test_a_config_file_can_take_an_argument(tmp_path: pathlib.Path):
    text = (_ROOT / "configs" / "debug.py").read_text()
    text = text.replace("def get_config()", "def get_config(name='none')")
    (tmp_path / "config.py").write_text(text.replace('name="debug"', "name=name"))
    path = str(tmp_path / "config.py")
    assert main.load_config(f"{path}:pushing").name == "pushing"
    assert main.load_config(path).name == "none"
