"""What a run says about itself: metrics, traces, activity, logs, the screen, videos. No jax.

Values arrive as Python numbers or numpy arrays. Nothing here writes outside the
work directory and the stream that the screen is given.
"""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

from jaxvla.registry import Registry

WRITERS = Registry(
    "writer",
    {
        "tensorboard": "jaxvla.telemetry.writers:TensorboardWriter",
        "wandb": "jaxvla.telemetry.writers:WandbWriter",
    },
)
"""Writers beside metrics.jsonl, which is always written."""


def get_logger(program: str) -> logging.Logger:
    """Logger of a program, e.g. "simulation".

    Its name is `jaxvla.PROGRAM`, so the module loggers (`logging.getLogger(__name__)`) of
    the package of the same name are its children and end in the same file.
    """
    return logging.getLogger(f"jaxvla.{program}")


@contextlib.contextmanager
def program_log(workdir: pathlib.Path, program: str) -> Iterator[logging.Logger]:
    """Appends what a program logs, from INFO up, to logs/PROGRAM.log while the block runs.

    Lines read `2026-01-31 12:00:00,123 INFO [PROGRAM] text`. They go to no other handler:
    the console belongs to the screen.
    """
    path = workdir / "logs" / f"{program}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [{program}] %(message)s"))
    logger = get_logger(program)
    before = (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.level, logger.propagate = before
