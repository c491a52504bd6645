"""Resolving and refusing configs."""

import dataclasses
from typing import Any

import pytest

from jaxvla.config import ConfigError
from jaxvla.models.pi_config import PiConfig, pi0_config, pi05_config, tiny_config
from jaxvla.models.tokenizer import ByteTokenizer


def resolve(config: PiConfig, spec, num_executed: int = 4) -> PiConfig:
    return config.resolve(spec, num_executed=num_executed, tokenizer=ByteTokenizer())


def test_resolve_fills_every_size_from_the_env(spec) -> None:
    config = resolve(tiny_config(), spec)
    sizes = (config.image_size, config.num_cameras, config.state_dim, config.action_dim)
    assert sizes == (32, 2, 5, 3)
    assert (config.log_prob_steps, config.log_prob_dims) == (4, 3)
    # "reach the blue ball" is 19 bytes, plus BOS and the line break: 21, rounded up to 24.
    assert config.max_tokens == 24
    assert -1 not in dataclasses.astuple(config)


def test_resolve_keeps_what_is_set(spec) -> None:
    given = dataclasses.replace(
        tiny_config(), max_tokens=21, state_dim=32, action_dim=32, log_prob_steps=2
    )
    config = resolve(given, spec)
    kept = (config.max_tokens, config.state_dim, config.action_dim, config.log_prob_steps)
    assert kept == (21, 32, 32, 2)
    assert config.log_prob_dims == 3
    assert given.image_size == -1  # the input is not changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 20),
        ("state_dim", 4),
        ("action_dim", 2),
        ("vocab_size", 259),
        ("image_size", 64),
        ("num_cameras", 3),
        ("patch_size", 12),
        ("vision_heads", 3),
        ("num_kv_heads", 3),
        ("head_dim", 15),
        ("expert_width", 63),
        ("log_prob_steps", 9),
        ("log_prob_dims", 4),
        ("time_conditioning", "film"),
        ("state_input", "text"),
        ("dtype", "float16"),
        ("exploration", "gauss"),
        ("value_input", "mean"),
        ("noise_low", 0.0),
        ("noise_high", 0.08),
        ("fpo_draws", 0),
        ("noise_level", 0.0),
        ("lora_scale", 0.0),
        ("num_denoise_steps", 0),
        ("depth", 0),
        ("value_widths", (0,)),
        ("value_widths", (-1,)),
        ("value_widths", (64, 0, 32)),
    ],
)
def test_impossible_settings_are_named(spec, field: str, value: Any) -> None:
    config = dataclasses.replace(tiny_config(), **{field: value})
    with pytest.raises(ConfigError, match=rf"config\.model\.{field} = "):
        resolve(config, spec)


_SIZES = [field for field in dataclasses.fields(PiConfig) if field.type is int]


@pytest.mark.parametrize("value", [0, -1, -2])
@pytest.mark.parametrize("field", _SIZES, ids=lambda field: field.name)
def test_no_size_is_zero_or_negative(spec, field: dataclasses.Field, value: int) -> None:
    """But for a default of -1 (filled in) or 0 (off). Known before an env is made."""
    config = dataclasses.replace(tiny_config(), **{field.name: value})
    if value == field.default:
        config.validate()
        assert getattr(resolve(config, spec), field.name) >= (0 if value == 0 else 1)
    else:
        with pytest.raises(
            ConfigError, match=rf"config\.model\.{field.name} = {value}: .* Fix: --"
        ):
            config.validate()


def test_a_value_head_may_be_linear(spec) -> None:
    config = resolve(dataclasses.replace(tiny_config(), value_widths=()), spec)
    assert config.value_widths == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"exploration": "cps"}, "ignore_last_step"),
        ({"exploration": "cps", "ignore_last_step": True, "noise_level": 1.5}, "noise_level"),
        ({"ignore_last_step": True, "num_denoise_steps": 1}, "num_denoise_steps"),
        ({"ignore_last_step": True, "exploration": "sde_chain"}, "ignore_last_step"),
        ({"ignore_last_step": True, "exploration": "noise"}, "ignore_last_step"),
        ({"ignore_last_step": True, "exploration": "fpo"}, "ignore_last_step"),
        ({"noise_low": 0.2}, "noise_high"),
    ],
)
def test_settings_that_exclude_each_other(spec, changes: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.model\.{field} = "):
        resolve(dataclasses.replace(tiny_config(), **changes), spec)


@pytest.mark.parametrize("make", [pi0_config, pi05_config])
def test_openpi_presets_resolve_for_a_padded_env(spec, make) -> None:
    big = dataclasses.replace(spec, image_size=224)
    config = resolve(make(), big)
    assert (config.state_dim, config.action_dim, config.log_prob_dims) == (32, 32, 3)
