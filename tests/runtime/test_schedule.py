"""The three switches of the schedule: what each lets overlap, seen in the order of the stages."""

from typing import Any

from staged_run import Event, Stages, run


def cycles(count: int, *events: Event) -> list[Event]:
    """Events whose last entry counts the cycles."""
    return [(*event, cycle) for cycle in range(count) for event in events]


# ----------------------------------------------------------------------- overlap_training

ONE_GROUP: dict[str, Any] = {
    "num_groups": 1,
    "segment_length": 1,
    "per_update": 1,
    "num_updates": 4,
}


def test_without_overlap_training_simulation_and_training_alternate() -> None:
    stages = Stages()
    run(stages, overlap_training=False, **ONE_GROUP)
    step, train = ("infer", "a"), ("train",)
    assert stages.log == cycles(4, step, ("step", "a"), ("stepped", "a"), train, ("trained",))


def test_with_overlap_training_simulation_goes_on_across_updates() -> None:
    """Every update but the last ends only after the trajectory of the next one is stepped."""
    stages = Stages()
    for update in range(3):
        stages.hold(("train", update), until=("stepped", "a", update + 1))
    run(stages, overlap_training=True, **ONE_GROUP)
    for update in range(3):
        during = stages.between(("train", update), ("trained", update))
        # Ahead by one update at most, the bound: the trajectory after the next must wait.
        assert ("step", "a", update + 2) not in during
    assert stages.of("train") == cycles(4, ("train",))


# ------------------------------------------------------------------------ overlap_rollout

TWO_GROUPS: dict[str, Any] = {
    "num_groups": 2,
    "segment_length": 3,
    "per_update": 2,
    "num_updates": 1,
}


def test_without_overlap_rollout_all_groups_move_in_lockstep() -> None:
    stages = Stages()
    run(stages, overlap_rollout=False, **TWO_GROUPS)
    asked: tuple[Event, ...] = (("infer", "a"), ("infer", "b"))
    assert stages.of("infer", "step") == cycles(3, *asked, ("step", "a"), ("step", "b"))


def test_with_overlap_rollout_each_group_asks_when_it_is_ready() -> None:
    """Two groups double-buffer: each one's inference runs while the other one steps."""
    stages = Stages()
    stages.hold(("step", "a", 0), until=("step", "b", 0))
    stages.hold(("step", "b", 0), until=("step", "a", 1))
    stages.hold(("step", "a", 1), until=("infer", "b", 1))
    run(stages, overlap_rollout=True, **TWO_GROUPS)
    assert ("infer", "a", 1) in stages.between(("step", "b", 0), ("stepped", "b", 0))
    assert ("infer", "b", 1) in stages.between(("step", "a", 1), ("stepped", "a", 1))


def test_with_overlap_rollout_a_slow_group_delays_no_other() -> None:
    """Group a is in its first chunk until b has made a whole trajectory."""
    stages = Stages()
    stages.hold(("step", "b", 0), until=("step", "a", 0))
    stages.hold(("step", "a", 0), until=("stepped", "b", 2))
    run(stages, overlap_rollout=True, **TWO_GROUPS)
    during = stages.between(("step", "a", 0), ("stepped", "a", 0))
    assert {("infer", "b", 1), ("infer", "b", 2)} <= set(during)


# -------------------------------------------------------------------- stream_microbatches

TWO_IN_A_BATCH: dict[str, Any] = {
    "num_groups": 1,
    "segment_length": 1,
    "per_update": 2,
    "num_updates": 2,
}


def test_without_stream_microbatches_the_learner_waits_for_the_batch() -> None:
    stages = Stages()
    run(stages, stream_microbatches=False, **TWO_IN_A_BATCH)
    assert stages.of("stepped", "train", "gradient") == [
        ("stepped", "a", 0),
        ("stepped", "a", 1),
        ("train", 0),
        ("stepped", "a", 2),
        ("stepped", "a", 3),
        ("train", 1),
    ]


def test_with_stream_microbatches_gradients_begin_as_trajectories_arrive() -> None:
    """The second trajectory of each batch is not stepped before the first has its gradient."""
    stages = Stages()
    for second, first in ((1, 0), (3, 2)):
        stages.hold(("step", "a", second), until=("gradient", first))
    run(stages, stream_microbatches=True, **TWO_IN_A_BATCH)
    assert stages.of("gradient", "apply", "train") == [
        ("gradient", 0),
        ("gradient", 1),
        ("apply", 0),  # one optimizer step per batch
        ("gradient", 2),
        ("gradient", 3),
        ("apply", 1),
    ]


def test_all_three_together() -> None:
    """Gradients of an update run while both groups simulate the next one, unlike fast."""
    stages = Stages()
    stages.hold(("gradient", 0), until=("step", "b", 1))
    stages.hold(("step", "a", 0), until=("infer", "b", 1))
    run(
        stages,
        overlap_training=True,
        overlap_rollout=True,
        stream_microbatches=True,
        num_groups=2,
        segment_length=1,
        per_update=2,
        num_updates=2,
    )
    assert len(stages.of("gradient")) == 4 and len(stages.of("apply")) == 2
