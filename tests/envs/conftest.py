"""One compiled tabletop env for all tests: its control step takes long to compile."""

import pytest
from compiled_tabletop import CompiledTabletop, compile_tabletop


@pytest.fixture(scope="session")
def tabletop() -> CompiledTabletop:
    """NUM_WORLDS worlds of every task."""
    return compile_tabletop()
