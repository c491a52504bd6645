"""Logs of programs, and what importing telemetry brings along."""

import logging
import subprocess
import sys

import pytest

from jaxvla.telemetry import get_logger, program_log


def test_each_program_has_its_file(tmp_path, capsys, caplog):
    with program_log(tmp_path, "simulation"), program_log(tmp_path, "learning"):
        get_logger("simulation").info("group %d ready", 0)
        logging.getLogger("jaxvla.learning.learner").warning("skipped an update")
        get_logger("learning").debug("too much detail")
        assert not caplog.records  # nothing reaches the root logger's handlers
    get_logger("simulation").info("after the end")
    simulation = (tmp_path / "logs/simulation.log").read_text()
    learning = (tmp_path / "logs/learning.log").read_text()
    assert simulation.endswith(" INFO [simulation] group 0 ready\n")
    assert learning.endswith(" WARNING [learning] skipped an update\n")
    assert (simulation.count("\n"), learning.count("\n")) == (1, 1)
    assert capsys.readouterr() == ("", "")


def test_a_log_is_continued_and_the_logger_restored(tmp_path):
    logger = get_logger("serving")
    before = (logger.level, logger.propagate, list(logger.handlers))
    for text in ("first run", "second run"):
        with pytest.raises(KeyError), program_log(tmp_path, "serving"):
            logger.info(text)
            raise KeyError
    assert (logger.level, logger.propagate, logger.handlers) == before
    lines = (tmp_path / "logs/serving.log").read_text().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["first run", "second run"]


def test_telemetry_imports_no_jax_and_no_optional_package():
    code = """
import sys
import jaxvla.telemetry.activity, jaxvla.telemetry.metrics, jaxvla.telemetry.progress
import jaxvla.telemetry.tracing, jaxvla.telemetry.video, jaxvla.telemetry.writers
found = {"jax", "tensorboardX", "wandb", "tensorflow"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
