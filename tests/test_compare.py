"""`python -m jaxvla.compare` as a user calls it."""

import pytest
from read_page import charts, read
from run_dirs import CONFIG, SUMMARY, record, write_run

from jaxvla import compare


def run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = compare.main(["compare", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def pair(tmp_path):
    first = write_run(tmp_path / "a" / "run")
    records = [record(i, rate__env_steps_per_s=1500.0 * i) for i in range(1, 11)]
    config = CONFIG | {"schedule": {"max_staleness": 8}, "new": {"flag": True}}
    summary = SUMMARY | {"evaluation_after": None, "staleness_bound": 8}
    second = write_run(tmp_path / "b" / "run", records=records, summary=summary, config=config)
    return first, second


def rows(text):
    """First column -> other cells of the table."""
    lines = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.split("\n")
    ]
    return {line[0]: line[1:] for line in lines if line}


def test_the_table_shows_results_and_only_the_settings_that_differ(pair, tmp_path, capsys):
    code, out, err = run(capsys, *pair, f"--out={tmp_path / 'c.html'}")
    assert (code, err) == (0, "")
    table = rows(out)
    assert out.split("\n")[0].split() == ["a/run", "b/run"]
    assert table["env steps/s"] == ["6.50k", "9.75k x1.50"]
    assert table["success after"] == ["0.75 [0.10, 0.50] of 16", "not evaluated"]
    assert table["simulation"] == ["70% busy, waits inference 30%"] * 2
    assert table["staleness"] == ["max 2, bound 2", "max 2, bound 8"]
    assert table["staleness, mean"] == ["1.50", "1.50"]
    assert table["query latency p99"] == ["30.0 ms", "30.0 ms"]
    assert "samples/s" not in table
    assert table["config.schedule.max_staleness"] == ["2", "8"]
    assert table["config.new.flag"] == ["-", "True"]
    assert not {"config.name", "config.model.initial_weights", "versions.jax"} & set(table)


def test_the_page_lays_curves_over_each_other(pair, tmp_path, capsys):
    out = tmp_path / "c.html"
    run(capsys, *pair, f"--out={out}")
    text = out.read_text()
    read(text)
    found = charts(text)
    first, second = found["Env steps: all"].lines()
    assert second[:, 1] == pytest.approx(1.5 * first[:, 1], rel=0.05)
    assert {"a/run", "b/run"} <= set(found["Env steps: all"].texts())
    assert {"Success in training by time", "Loss: total", "Staleness: bound"} <= set(found)
    assert "simulation, a/run, busy: 70%" in found["Busy and waiting"].tips()
    assert run(capsys, *pair, f"--out={out}")[0] == 0 and out.read_text() == text


def test_equal_configs_and_runs_of_other_kinds(tmp_path, capsys):
    first = write_run(tmp_path / "a")
    records = [{"update": 1, "time_s": 2.0, "rate/samples_per_s": 40.0}]
    second = write_run(tmp_path / "b", records=records, summary=None)
    code, out, _ = run(capsys, first, second, f"--out={tmp_path / 'c.html'}")
    assert code == 0 and "no settings differ" in out
    assert rows(out)["samples/s"] == ["-", "40.0"]
    assert rows(out)["env steps/s"] == ["6.50k", "-"]
    assert rows(out)["outcome"] == ["finished", "no summary yet"]


def test_bad_directories_exit_with_two_and_write_nothing(pair, tmp_path, capsys):
    first, _ = pair
    empty = write_run(tmp_path / "empty", records=[], summary=None)
    (tmp_path / "bare").mkdir()
    out = tmp_path / "c.html"
    for others, message in (
        ([tmp_path / "bare"], "has no metrics.jsonl"),
        ([tmp_path / "missing"], "is not a directory"),
        ([empty], "holds no record"),
        ([first], "is given twice"),
        ([], "want two or more"),
    ):
        code, printed, err = run(capsys, first, *others, f"--out={out}")
        assert (code, printed) == (2, "")
        assert err.startswith("error: ") and message in err and "Fix: " in err
    assert not out.exists()
    code, _, err = run(capsys, *pair, f"--out={tmp_path / 'no' / 'c.html'}")
    assert code == 2 and "--out=" in err
    with pytest.raises(SystemExit) as caught:
        compare.main(["compare", "--frobnicate"])
    assert caught.value.code == 2
