"""Configs as plain data, for the processes of a run that are not the one that read the file.

Every section is a dict under its field names. One that is a subclass of what its field declares,
as the config of a plug-in is, names its class under "class". No jax.
"""

import dataclasses
import enum
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from jaxvla.config import ExperimentConfig

_CLASS = "class"


def config_to_data(config: ExperimentConfig) -> dict[str, Any]:
    """What `config_from_data` makes the same config from: values that JSON knows."""
    return _section(config, ExperimentConfig)


def config_from_data(data: Mapping[str, Any]) -> ExperimentConfig:
    """The config of some data.

    Raises:
      ValueError: a field is unknown or missing, has another type, or a class is no config of the
        kind that its field declares. The text names the field.
    """
    return _from_section(data, ExperimentConfig, "config")


def _section(section: Any, declared: type) -> dict[str, Any]:
    hints = typing.get_type_hints(type(section))
    data = {
        field.name: _plain(getattr(section, field.name), hints[field.name])
        for field in dataclasses.fields(section)
    }
    if type(section) is not declared:
        data[_CLASS] = f"{type(section).__module__}:{type(section).__qualname__}"
    return data


def _plain(value: Any, declared: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _section(value, declared)
    if isinstance(value, enum.Enum):
        return value.name
    return [_plain(item, None) for item in value] if isinstance(value, tuple) else value


def _from_section(data: Any, declared: type, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} is no section")
    kind = _section_class(data, declared, path)
    hints, names = typing.get_type_hints(kind), {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in data.items() if name != _CLASS}
    if given.keys() != names:
        wrong = sorted(given.keys() ^ names)[0]
        raise ValueError(f"{path}.{wrong} is {'unknown' if wrong in given else 'missing'}")
    return kind(
        **{name: _value(value, hints[name], f"{path}.{name}") for name, value in given.items()}
    )


def _section_class(data: Mapping[str, Any], declared: type, path: str) -> type:
    """The class of a section; no other than configs can be named."""
    name = data.get(_CLASS)
    if name is None:
        return declared
    module, _, attribute = str(name).partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is of class {name!r}, which cannot be had: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, declared)):
        raise ValueError(f"{path} is of class {name!r}, which is no {declared.__name__}")
    return kind


def _value(value: Any, declared: Any, path: str) -> Any:
    if dataclasses.is_dataclass(declared):
        return _from_section(value, typing.cast(type, declared), path)
    if isinstance(declared, type) and issubclass(declared, enum.Enum):
        if value not in declared.__members__:
            raise ValueError(f"{path} = {value!r} is no {declared.__name__}")
        return declared[value]
    if typing.get_origin(declared) is tuple:
        item = typing.get_args(declared)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path} = {value!r} is no list")
        return tuple(_value(part, item, path) for part in value)
    if declared is float and type(value) is int:
        return float(value)
    if isinstance(declared, type) and type(value) is not declared:
        raise ValueError(f"{path} = {value!r} is no {declared.__name__}")
    return value
