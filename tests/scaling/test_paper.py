"""Calibrated on the paper's 8-GPU rows: what is predicted for 16 and 32."""

import pytest

from jaxvla.scaling.paper import PROFILES, ROWS, PaperError, paper_errors
from jaxvla.scaling.profiles import LIBERO_PI0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def errors() -> list[PaperError]:
    return list(paper_errors(LIBERO_PI0, num_updates=2))


def test_every_row_is_predicted_from_eight_gpus(errors: list[PaperError]):
    assert [(x.row, x.num_gpus) for x in errors] == [(row, n) for row in ROWS for n in (8, 16, 32)]
    for x in errors:
        assert x.anchored == pytest.approx(x.printed) or x.num_gpus > 8
    synchronous = [x for x in errors if x.row in ("colocated", "disaggregated")]
    for x in synchronous:
        # What is calibrated on: sums of stages. The paper's colocated rollout slows by 16 % from 8
        # to 32 GPUs, which no 8-GPU row tells.
        assert abs(x.error) < (0.03 if x.num_gpus == 8 else 0.13)


def test_units_without_a_slow_network_nearly_add_up(errors: list[PaperError]):
    for row in ROWS:
        rates = {x.num_gpus: x.simulated for x in errors if x.row == row}
        for num_gpus in (16, 32):
            # Up to the random lengths of the two updates that are measured.
            assert rates[num_gpus] == pytest.approx(num_gpus / 8 * rates[8], rel=0.05), row


def test_profiles_have_a_calibration():
    assert all(8 in profile.rows for profile in PROFILES)
