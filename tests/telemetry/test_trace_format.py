"""What a tracer writes is what a viewer of the trace event format reads."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_format import TraceError, check_trace

from jaxvla.telemetry.tracing import Drained, Tracer

_TREES = st.recursive(
    st.floats(0, 10), lambda children: st.lists(children, min_size=1, max_size=3), max_leaves=12
)
"""A span that lasts so long, or one around others."""


class Clock:
    """Moves when told to."""

    def __init__(self):
        self.now_s = 1e5  # of a machine that has been up for a day: floats are coarse there

    def __call__(self):
        return self.now_s


def spend(tracer, clock, tree, depth=0):
    with tracer.span(f"depth {depth}", rows=depth):
        if isinstance(tree, float):
            clock.now_s += tree
        else:
            for child in tree:
                spend(tracer, clock, child, depth + 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(_TREES, max_size=4))
def test_any_nested_spans_make_a_valid_trace(tmp_path_factory, trees):
    clock = Clock()
    tracer = Tracer(clock=clock)
    tracer.name_thread("simulation", 'group "0"\n')
    for tree in trees:
        spend(tracer, clock, tree)
    drained = Drained(
        program="serving", thread="server_0", spans=[("infer", 1e5, 1e5 + 1, {})], num_lost=3
    )
    tracer.absorb(drained)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    tracer.write(path)
    spans = check_trace(path.read_text(encoding="utf-8"))
    assert len(spans) == 1 + json.dumps(trees).count("[") - 1 + sum(map(_num_leaves, trees))


def _num_leaves(tree):
    return 1 if isinstance(tree, float) else sum(map(_num_leaves, tree))


_VALID = {
    "displayTimeUnit": "ms",
    "traceEvents": [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "serving"}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "server_0"}},
        {"ph": "X", "pid": 1, "tid": 1, "name": "infer", "ts": 10.0, "dur": 5.5},
        {"ph": "X", "pid": 1, "tid": 1, "name": "pull", "ts": 11, "dur": 2, "args": {"rows": 3}},
    ],
}


def test_a_valid_trace_passes():
    assert len(check_trace(json.dumps(_VALID))) == 2


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (2, {"ph": "Q"}),
        (2, {"ts": -1.0}),
        (2, {"ts": "10"}),
        (2, {"ts": float("nan")}),
        (2, {"dur": None}),
        (2, {"dur": 2.0}),  # the inner span would end after it
        (2, {"pid": 2}),
        (2, {"tid": 2}),
        (2, {"tid": "server"}),
        (2, {"name": ""}),
        (3, {"args": [3]}),
        (0, {"args": {}}),
        (0, {"name": "program_name"}),
        (1, {"args": {"name": 1}}),
        (1, {"tid": 2}),
    ],
)
def test_what_a_viewer_would_not_show_is_found(index, change):
    trace = copy.deepcopy(_VALID)
    trace["traceEvents"][index] |= change
    with pytest.raises(TraceError):
        check_trace(json.dumps(trace))
