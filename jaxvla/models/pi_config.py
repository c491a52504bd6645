"""Configuration of the pi family: sizes, behaviour, presets."""

import dataclasses
import math
from dataclasses import dataclass

from jaxvla.config import ConfigError, ModelConfig, override
from jaxvla.models import gemma, siglip
from jaxvla.models.exploration import KINDS, Exploration, PathExploration
from jaxvla.models.fpo import FpoExploration
from jaxvla.models.layers import REMAT, LayerLoop
from jaxvla.models.prompts import encode_prompt
from jaxvla.models.state_prompts import longest_prompt
from jaxvla.models.tokenizer import Tokenizer
from jaxvla.types import EnvSpec

_CHOICES = {
    "time_conditioning": ("adarms", "concat"),
    "state_input": ("token", "prompt", "none"),
    "normalization": ("quantile", "zscore"),
    "exploration": (*KINDS, "fpo"),
    "value_input": ("prefix", "suffix"),
    "dtype": ("float32", "bfloat16"),
    "remat": REMAT,
}


@dataclass(kw_only=True, slots=True)
class PiConfig(ModelConfig):
    """Sizes and behaviour of a pi model. `resolve` fills every -1 from the env."""

    name: str = "pi"
    vision_width: int
    """Width of the SigLIP encoder."""
    vision_depth: int
    """Encoder blocks."""
    vision_mlp_width: int
    """Hidden width of the encoder's MLPs."""
    vision_heads: int
    """Attention heads of the encoder; divides vision_width."""
    patch_size: int
    """Pixels of a square patch; divides image_size."""
    vlm_width: int
    """Width of the language model."""
    vlm_mlp_width: int
    """Hidden width of the language model's MLPs."""
    expert_width: int
    """Width of the action expert; even."""
    expert_mlp_width: int
    """Hidden width of the action expert's MLPs."""
    depth: int
    """Layers of both experts."""
    num_heads: int
    """Query heads of both experts."""
    num_kv_heads: int
    """Key/value heads of both experts; divides num_heads."""
    head_dim: int
    """Width of a head; even."""
    vocab_size: int
    """Rows of the token table, at least the tokenizer's."""
    value_widths: tuple[int, ...]
    """Hidden widths of the value head; empty: it is linear."""
    image_size: int = -1
    """Pixels of the square images; -1: the env's."""
    num_cameras: int = -1
    """Cameras C; -1: the env's."""
    state_dim: int = -1
    """State dimensions the model reads, zero-padded beyond the env's; -1: the env's."""
    action_dim: int = -1
    """Action dimensions the model predicts, beyond the env's padding; -1: the env's."""
    time_conditioning: str = "adarms"
    """"adarms": the flow time modulates every norm of the action expert (pi0.5);
    "concat": it is mixed into the action tokens (pi0)."""
    state_input: str = "token"
    """"token": the state is a suffix token (pi0); "prompt": it is told in the prompt (pi0.5);
    "none": it is not an input (openpi's pi05_libero)."""
    delta_dims: int = 0
    """Actions are predicted relative to the state in their first dimensions, as many as this; 6
    for openpi's pi0_libero."""
    vlm_lora_rank: int = 0
    """Rank of low-rank adapters of the language model (LoRA); 0: none. They learn in the place of
    the weights when `optimizer.trainable` leaves those out, as "lora_" does."""
    expert_lora_rank: int = 0
    """The same for the action expert."""
    lora_scale: float = 1.0
    """Factor of the adapters of attention, alpha / rank, > 0. openpi scales no others."""
    dtype: str = "float32"
    """Compute dtype of the transformers: "float32" or "bfloat16"."""
    remat: str = "auto"
    """What the backward pass recomputes: "auto", "none", "dots" or "layers" (least memory, about a
    third more compute), see `jaxvla.models.layers.LayerLoop`."""
    max_unrolled_layers: int = 4
    """Stacks of more layers are scanned, which compiles one layer for all."""
    grounding_coef: float = 0.0
    """Weight of the grounding loss in supervised training, see `jaxvla.models.grounding`;
    0: the model has no grounding head."""
    loss_draws: int = 1
    """Draws of (noise, flow time) per sample of the flow-matching loss; they share a prefix."""
    value_input: str = "prefix"
    """"prefix": the value head reads the mean of the prefix features; "suffix": the mean of the
    action expert's features at a fixed point of the flow, see `PiPolicy.value`."""
    detach_value: bool = False
    """The value head's gradient does not reach the model that it reads features of."""
    num_denoise_steps: int = 4
    """Denoise steps K."""
    exploration: str = "sde"
    """"sde" or "cps": one stochastic denoise step; "sde_chain", "noise" or "reinflow": all are,
    see `jaxvla.models.exploration`; "fpo": none is, see `jaxvla.models.fpo`."""
    noise_level: float = 0.5
    """Strength a of exploration, in (0, 1] for cps and > 0 for sde and sde_chain, which alone
    read it."""
    noise_low: float = 0.08
    """For noise and reinflow: smallest standard deviation of the noise head, > 0."""
    noise_high: float = 0.16
    """For noise and reinflow: largest one, > noise_low."""
    fpo_draws: int = 8
    """For fpo: draws N of (noise, flow time) that a sample is judged by."""
    ignore_last_step: bool = False
    """The last denoise step is never the stochastic one; required by cps, for sde and cps only."""
    log_prob_steps: int = -1
    """Control steps of a chunk whose density is scored, and whose features the suffix critic reads;
    -1: the executed ones. fpo scores the whole chunk."""
    log_prob_dims: int = -1
    """Action dimensions whose density is scored; -1: the env's. fpo scores the whole chunk."""

    def resolve(self, spec: EnvSpec, *, num_executed: int, tokenizer: Tokenizer) -> "PiConfig":
        """Returns a copy with every -1 filled in, validated.

        Args:
          spec: the env that the policy acts in.
          num_executed: control steps run of each chunk.
          tokenizer: tokenizer of the instructions.

        Raises:
          ConfigError: the sizes do not fit each other or the env.
        """
        longest = self._longest_prompt(spec, tokenizer)
        env_sizes = {
            "image_size": spec.image_size,
            "num_cameras": len(spec.cameras),
            "max_tokens": -(-longest // 8) * 8,
            "state_dim": spec.state_dim,
            "action_dim": spec.action_dim,
            "log_prob_steps": num_executed,
            "log_prob_dims": spec.action_dim,
        }
        filled = {name: size for name, size in env_sizes.items() if getattr(self, name) == -1}
        resolved = dataclasses.replace(self, **filled)
        for name in ("image_size", "num_cameras"):
            size = env_sizes[name]
            fits = getattr(resolved, name) == size
            require(resolved, name, fits, f"must be {size}, the env's", "change it or the env's")
        least = env_sizes | {"max_tokens": longest, "vocab_size": tokenizer.vocab_size}
        for name in ("max_tokens", "state_dim", "action_dim", "vocab_size"):
            fits = getattr(resolved, name) >= least[name]
            require(resolved, name, fits, f"must be >= {least[name]}", "raise it")
        most = min(spec.state_dim, spec.action_dim)
        require(resolved, "delta_dims", self.delta_dims <= most, f"must be <= {most}", "lower it")
        resolved.validate()
        return resolved

    def tells_state(self) -> bool:
        """See `ModelConfig.tells_state`."""
        return self.state_input == "prompt"

    def _longest_prompt(self, spec: EnvSpec, tokenizer: Tokenizer) -> int:
        if not self.tells_state():
            return max(len(encode_prompt(tokenizer, text)) for text in spec.instructions)
        try:
            return longest_prompt(tokenizer, spec.instructions, spec.state_dim)
        except ValueError as error:
            fix = override("model.state_input", "none")
            raise ConfigError("model.state_input", "prompt", str(error), fix) from error

    def validate(self) -> None:
        """Checks what holds for any env. Sizes that the env gives may still be -1.

        Raises:
          ConfigError: a setting cannot work, or two exclude each other.
        """
        self._validate_positive()
        self._validate_pairs()
        for name, choices in _CHOICES.items():
            known = ", ".join(choices)
            require(self, name, getattr(self, name) in choices, f"known: {known}", "choose one")
        fits = self.grounding_coef >= 0.0
        require(self, "grounding_coef", fits, "must be >= 0", "set 0")
        require(self, "lora_scale", self.lora_scale > 0.0, "must be > 0", "set 1.0")
        self._validate_exploration()

    def validate_resolved(self) -> None:
        """Checks a config that a model is to be made from.

        Raises:
          ConfigError: as `validate`, or a size is missing.
        """
        self.validate()
        for field in dataclasses.fields(self):
            is_missing = field.type is int and getattr(self, field.name) == -1
            require(self, field.name, not is_missing, "is not filled in", "resolve the config")

    def _validate_positive(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int:
                size = getattr(self, field.name)
                least = field.default if field.default in (-1, 0) else 1
                fix = override(f"model.{field.name}", least)
                require(self, field.name, size >= 1 or size == least, "must be >= 1", fix)
        possible = tuple(width for width in self.value_widths if 1 <= width < 2**31)
        fits, fix = possible == self.value_widths, override("model.value_widths", possible)
        require(self, "value_widths", fits, "each must be in [1, 2**31)", fix)

    def _validate_pairs(self) -> None:
        """Sizes that must divide or not exceed another one, where that is known already."""
        for name, total in (
            ("patch_size", "image_size"),
            ("vision_heads", "vision_width"),
            ("num_kv_heads", "num_heads"),
        ):
            size, whole = getattr(self, name), getattr(self, total)
            fits, fix = whole == -1 or whole % size == 0, math.gcd(size, whole)
            allowed = f"must divide model.{total} = {whole}"
            require(self, name, fits, allowed, override(f"model.{name}", fix))
        for name in ("head_dim", "expert_width"):
            size = getattr(self, name)
            require(self, name, size % 2 == 0, "must be even", override(f"model.{name}", size + 1))
        for name, total in (("log_prob_steps", "action_horizon"), ("log_prob_dims", "action_dim")):
            size, whole = getattr(self, name), getattr(self, total)
            fits, fix = whole == -1 or size <= whole, override(f"model.{name}", whole)
            require(self, name, fits, f"must be <= model.{total} = {whole}", fix)

    def _validate_exploration(self) -> None:
        require(self, "noise_level", self.noise_level > 0.0, "must be > 0", "try 0.5")
        if self.exploration == "cps":
            fits = self.noise_level <= 1.0
            require(self, "noise_level", fits, "must be <= 1 for cps", "try 0.5")
            fits = self.ignore_last_step
            require(self, "ignore_last_step", fits, "the last step of cps is noiseless", "set it")
        if self.ignore_last_step:
            fits = self.exploration in ("sde", "cps")
            require(self, "ignore_last_step", fits, "is for sde and cps only", "unset it")
            fits = self.num_denoise_steps >= 2
            require(self, "num_denoise_steps", fits, "must be >= 2 to ignore the last", "set 2")
        require(self, "noise_low", self.noise_low > 0.0, "must be > 0", "try 0.08")
        fits = self.noise_high > self.noise_low
        allowed = f"must be > model.noise_low = {self.noise_low}"
        require(self, "noise_high", fits, allowed, f"try {2.0 * self.noise_low:g}")

    @property
    def num_random_steps(self) -> int:
        """Denoise steps among which the stochastic one is drawn."""
        return self.num_denoise_steps - self.ignore_last_step

    @property
    def has_noise_head(self) -> bool:
        """Whether exploration learns its standard deviations."""
        return self.exploration in KINDS and KINDS[self.exploration].has_noise_head

    @property
    def value_input_width(self) -> int:
        """Width of what the value head reads: the state is in the suffix, not in the prefix."""
        if self.value_input == "suffix":
            return self.expert_width
        return self.vlm_width + (self.state_dim if self.state_input == "token" else 0)

    @property
    def loop(self) -> LayerLoop:
        """How stacks of layers are run."""
        return LayerLoop(max_unrolled=self.max_unrolled_layers, remat=self.remat)

    @property
    def vision(self) -> siglip.SiglipSize:
        """Sizes of the vision encoder."""
        return siglip.SiglipSize(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.vision_width,
            depth=self.vision_depth,
            mlp_width=self.vision_mlp_width,
            num_heads=self.vision_heads,
            out_width=self.vlm_width,
        )

    def expert(self, expert: str) -> gemma.ExpertSize:
        """Sizes of the language model or the action expert."""
        is_language = expert == gemma.LANGUAGE
        return gemma.ExpertSize(
            width=self.vlm_width if is_language else self.expert_width,
            depth=self.depth,
            mlp_width=self.vlm_mlp_width if is_language else self.expert_mlp_width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            lora_rank=self.vlm_lora_rank if is_language else self.expert_lora_rank,
        )

    def make_exploration(self) -> Exploration:
        """What `exploration` names."""
        if self.exploration == "fpo":
            return FpoExploration(
                num_steps=self.num_denoise_steps,
                num_draws=self.fpo_draws,
                loss_steps=self.log_prob_steps,
                loss_dims=self.log_prob_dims,
            )
        return PathExploration(
            KINDS[self.exploration],
            num_steps=self.num_denoise_steps,
            noise_level=self.noise_level,
            num_choices=self.num_random_steps,
            log_prob_steps=self.log_prob_steps,
            log_prob_dims=self.log_prob_dims,
        )


def require(config: PiConfig, name: str, holds: bool, allowed: str, fix: str) -> None:
    """Raises ConfigError about `model.NAME` unless the condition holds."""
    if not holds:
        raise ConfigError(f"model.{name}", getattr(config, name), allowed, fix)


def tiny_config() -> PiConfig:
    """About 0.7 M parameters: trains from scratch on a CPU with 64 px images."""
    return PiConfig(
        vision_width=64,
        vision_depth=2,
        vision_mlp_width=128,
        vision_heads=4,
        patch_size=16,
        vlm_width=96,
        vlm_mlp_width=256,
        expert_width=64,
        expert_mlp_width=128,
        depth=3,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=320,
        value_widths=(128, 64),
        grounding_coef=1.0,
        loss_draws=4,
    )


def pi0_config() -> PiConfig:
    """openpi's pi0: So400m/14, Gemma 2B, 300 M action expert; 3.2 B parameters."""
    return PiConfig(
        action_horizon=50,
        vision_width=1152,
        vision_depth=27,
        vision_mlp_width=4304,
        vision_heads=16,
        patch_size=14,
        vlm_width=2048,
        vlm_mlp_width=16_384,
        expert_width=1024,
        expert_mlp_width=4096,
        depth=18,
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
        vocab_size=257_152,
        value_widths=(512, 256, 128),
        image_size=224,
        max_tokens=48,
        state_dim=32,
        action_dim=32,
        time_conditioning="concat",
        normalization="zscore",
        dtype="bfloat16",
        remat="layers",
        num_denoise_steps=10,
    )


def pi05_config() -> PiConfig:
    """openpi's pi0.5: pi0 with adaRMS time conditioning and the state in the prompt, not as a
    token; 3.4 B parameters."""
    return dataclasses.replace(
        pi0_config(),
        time_conditioning="adarms",
        state_input="prompt",
        normalization="quantile",
        max_tokens=200,
        value_widths=(1024, 512, 256),
    )
