"""What crosses between the processes of a run. Both sides make these from the same config."""

from jaxvla.runtime.build import Blueprint
from jaxvla.runtime.groups import Groups, group_name
from jaxvla.serving.remote_schema import InferenceSchema
from jaxvla.simulation.segment_codec import SegmentCodec


def inference_schema(blueprint: Blueprint) -> InferenceSchema:
    """Of chunk queries and their answers."""
    results = {"explore": blueprint.sample_struct(1), "value": blueprint.value_struct(1)}
    return InferenceSchema(blueprint.observation_struct(1), results)


def segment_codec(blueprint: Blueprint, groups: Groups) -> SegmentCodec:
    """Of trajectories."""
    names = [group_name(index) for index in range(blueprint.config.simulation.num_groups)]
    return SegmentCodec(blueprint.trajectory_struct(), groups.targets(names))
