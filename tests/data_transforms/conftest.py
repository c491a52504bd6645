"""openpi's transforms, recorded."""

import pathlib

import numpy as np
import pytest


@pytest.fixture(scope="session")
def cases() -> dict[str, np.ndarray]:
    """Arrays by name, see tests/data/oracle/README.md."""
    path = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "transforms.npz"
    with np.load(path) as file:
        return dict(file)
