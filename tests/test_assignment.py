"""Which policy server answers which env group."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.assignment import AssignmentError, most_groups, parse_assignment


def test_round_robin():
    assert parse_assignment("round_robin", num_groups=5, num_servers=2) == (0, 1, 0, 1, 0)
    assert parse_assignment("round_robin", num_groups=2, num_servers=1) == (0, 0)


def test_explicit():
    assert parse_assignment("1,0,1", num_groups=3, num_servers=2) == (1, 0, 1)


def test_greedy_is_decided_later():
    assert parse_assignment("greedy", num_groups=3, num_servers=2) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must be round_robin, greedy or servers"),
        ("nearest", "must be round_robin, greedy or servers"),
        ("0,1,", "must be round_robin, greedy or servers"),
        ("0, 1, 0", "must be round_robin, greedy or servers"),
        ("0,1,-1", "must be round_robin, greedy or servers"),
        ("0,1,²", "must be round_robin, greedy or servers"),
        ("0,1", "each of the 3 env groups"),
        ("0,1,0,1", "each of the 3 env groups"),
        ("0,1,2", "every server from 0 to 1, and no other"),
        ("1,1,1", "every server from 0 to 1, and no other"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, complaint: str):
    for read in (parse_assignment, most_groups):
        with pytest.raises(AssignmentError, match=complaint):
            read(text, num_groups=3, num_servers=2)


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 6))
def test_most_groups_is_what_the_busiest_server_has(data: st.DataObject, servers: int, more: int):
    sizes = {"num_groups": servers + more, "num_servers": servers}
    extra = st.lists(st.integers(0, servers - 1), min_size=more, max_size=more)
    shuffled = data.draw(st.permutations([*range(servers), *data.draw(extra)]))
    for text in ("round_robin", ",".join(map(str, shuffled))):
        parsed = parse_assignment(text, **sizes)
        assert most_groups(text, **sizes) == max(Counter(parsed).values())
