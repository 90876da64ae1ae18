"""Model configurations: frozen dataclasses, the named presets, and the strict reader that builds them from a mapping.

Every value is checked where it is built; an error names the key as a user writes it
(`model.voco.num_vocos must be >= 1, got 0`).
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration value that cannot be used; `key` is its dotted path below the config being built."""

    def __init__(self, key: str, problem: str):
        self.key, self.problem = key, problem
        super().__init__(key, problem)  # what pickling builds it from again

    def __str__(self) -> str:
        return f"{self.key} {self.problem}"


def require(condition: bool, key: str, problem: str, value: Any) -> None:
    """Raises `ConfigError("<key> <problem>, got <value>")` unless the condition holds."""
    if not condition:
        raise ConfigError(key, f"{problem}, got {value!r}")


def require_positive(config: Any, *keys: str) -> None:
    """Raises `ConfigError` for the first of the named integer fields that is below 1."""
    for key in keys:
        require(getattr(config, key) >= 1, key, "must be >= 1", getattr(config, key))


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, by default CLIP's ViT-L/14 at 336 px.

    kind: `clip` (arXiv 2103.00020) or `eva` (EVA-CLIP, arXiv 2303.15389, as BLIP-2 and LLaMA-VID use it: the last
      block's output without a final norm, so `depth` counts only the blocks that are run and `select_layer` is -1).
    """

    kind: Literal["clip", "eva"] = "clip"
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    select_layer: int = -2  # which hidden state feeds the projector; -1 is the last block's output
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "patch_size", "width", "depth", "num_heads", "mlp_width")
        require(self.image_size % self.patch_size == 0, "image_size", f"must be a multiple of {self.patch_size}",
                self.image_size)
        require(self.width % self.num_heads == 0, "num_heads", f"must divide width {self.width}", self.num_heads)
        lowest = -self.depth if self.kind == "clip" else -1
        require(lowest <= self.select_layer <= -1, "select_layer", f"must be in [{lowest}, -1]", self.select_layer)

    @property
    def num_patches(self) -> int:
        """Vision tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ProjectorConfig:
    """The map from vision features to decoder embeddings: one linear layer, or LLaVA-1.5's two with a GELU."""

    kind: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"


@dataclass(frozen=True)
class RopeScalingConfig:
    """How the rotary frequencies are stretched for longer contexts.

    kind: `llama3` stretches the low ones by `factor` (Llama 3.1); `linear` stretches all of them and has no use for the
      other fields (Vicuna-16k).
    """

    kind: Literal["llama3", "linear"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", "must be >= 1", self.factor)
        require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor",
                f"must be above low_freq_factor {self.low_freq_factor}", self.high_freq_factor)


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA decoder, by default Vicuna-7B's with one row more for `<voco>`."""

    vocab_size: int = 32001  # the appended <voco> row included
    vocab_padding: int = 0  # how many of the last rows stand for no token and only make `vocab_size` shardable
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_width: int = 128
    mlp_width: int = 11008
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: int = 4096  # what it was trained for; nothing here depends on it, exports say it

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "width", "depth", "num_heads", "num_kv_heads", "head_width", "mlp_width",
                         "max_positions")
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads {self.num_heads}",
                self.num_kv_heads)
        require(0 <= self.vocab_padding < self.vocab_size, "vocab_padding",
                f"must be in [0, vocab_size {self.vocab_size})", self.vocab_padding)
        require(self.head_width % 2 == 0, "head_width", "must be even for rotary positions", self.head_width)

    @property
    def num_tokens(self) -> int:
        """Rows of the vocabulary that stand for a token."""
        return self.vocab_size - self.vocab_padding


@dataclass(frozen=True)
class VocoConfig:
    """The VoCo tokens: how many stand behind each unit's vision tokens, and their row in the vocabulary."""

    num_vocos: int = 1
    token_id: int = 32000

    def __post_init__(self) -> None:
        require_positive(self, "num_vocos")
        require(self.token_id >= 0, "token_id", "must be >= 0", self.token_id)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): a target kernel W acts as W + (alpha / rank) A B.

    rank: of A and B; 0 is no LoRA. targets: regexes over parameter paths, matched whole, of kernels of linear layers.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("decoder/blocks/.*/kernel",)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", "must be >= 1, or 0 for no LoRA", self.rank)
        require(self.alpha > 0, "alpha", "must be > 0", self.alpha)
        require(bool(self.targets) or not self.rank, "targets", "must name the kernels that get factors", self.targets)
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError("targets", f"has the invalid regex {pattern!r}: {error}") from None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class CompressorConfig:
    """What shortens an image's vision tokens before the decoder sees them.

    `none`: nothing does; the decoder itself compresses into VoCo tokens. `avg_pool` and `qformer` are the baselines
    of paper §4.2: they put `num_tokens` compressed tokens in place of the vision tokens, and no VoCo token follows.
    `depth`, `width`, `num_heads`, `mlp_width` and `cross_attention_every` are the Q-Former's (BLIP-2's by default).
    """

    kind: Literal["none", "avg_pool", "qformer"] = "none"
    num_tokens: int = 1
    depth: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    cross_attention_every: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        require_positive(self, "num_tokens", "depth", "width", "num_heads", "mlp_width", "cross_attention_every")
        require(self.width % self.num_heads == 0, "num_heads", f"must divide width {self.width}", self.num_heads)
        if self.kind == "avg_pool":
            require(self.num_tokens == 1, "num_tokens", "must be 1 for avg_pool, which averages all tokens into one",
                    self.num_tokens)
        if self.kind == "qformer":
            require(self.depth % self.cross_attention_every == 0, "depth",
                    f"must be a multiple of cross_attention_every {self.cross_attention_every}", self.depth)


@dataclass(frozen=True)
class ModelConfig:
    """A VoCo-LLaMA: vision tower, compressor (baselines only), projector, decoder and VoCo tokens."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    voco: VocoConfig = field(default_factory=VocoConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)

    def __post_init__(self) -> None:
        require(self.voco.token_id < self.decoder.num_tokens, "voco.token_id",
                f"must be below {self.decoder.num_tokens}, the decoder's vocab_size without padding",
                self.voco.token_id)

    @property
    def unit_tokens(self) -> int:
        """Tokens that stand for one image's pixels in a unit: its vision tokens, or a baseline's compressed ones."""
        return self.vision.num_patches if self.compressor.kind == "none" else self.compressor.num_tokens

    @property
    def unit_vocos(self) -> int:
        """VoCo tokens of one unit: none where a baseline compresses instead of the decoder."""
        return self.voco.num_vocos if self.compressor.kind == "none" else 0


def _clip_vicuna(image_size: int, decoder: DecoderConfig) -> ModelConfig:
    return ModelConfig(vision=VisionConfig(image_size=image_size), decoder=decoder)


# What `vocojax.convert` makes of Vicuna's vocabulary of 32000: a row for <voco>, and padding to a multiple of 256.
_VICUNA_7B = DecoderConfig(vocab_size=32256, vocab_padding=255)
_VICUNA_13B = dataclasses.replace(_VICUNA_7B, width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_width=13824)

PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType({
    "tiny": ModelConfig(
        vision=VisionConfig(image_size=64, patch_size=16, width=64, depth=2, num_heads=4, mlp_width=256),
        decoder=DecoderConfig(vocab_size=64, width=64, depth=3, num_heads=2, num_kv_heads=2, head_width=32,
                              mlp_width=128),
        voco=VocoConfig(token_id=63),
    ),
    "clip_l_336_vicuna_7b": _clip_vicuna(336, _VICUNA_7B),
    "clip_l_224_vicuna_7b": _clip_vicuna(224, _VICUNA_7B),
    "clip_l_336_vicuna_13b": _clip_vicuna(336, _VICUNA_13B),
})


def preset(name: str) -> ModelConfig:
    """The model configuration of that name; `ConfigError` lists the names there are."""
    if name not in PRESETS:
        raise ConfigError("preset", f"must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def build(cls: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """Builds the dataclass `cls` from a nested mapping, strictly.

    Args:
      cls: a frozen dataclass whose fields are scalars, tuples, Literals or dataclasses (also `| None`).
      values: its fields; those left out keep their defaults. Lists become tuples.
      key: dotted path of `values` in the whole config, for errors.

    Raises:
      ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or one out of range.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else name
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(path, f"is not a key of {cls.__name__}{hint}")
        arguments[name] = _convert(known[name], value, path)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error.key}" if key else error.key, error.problem) from None
    except TypeError as error:
        raise ConfigError(key or cls.__name__, f"is incomplete: {error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, path)
    if origin is Literal:
        if value not in options:
            raise ConfigError(path, f"must be one of {', '.join(map(repr, options))}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(path, f"must be a list, got {value!r}")
        return tuple(_convert(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(path, f"must be a mapping with the keys of {hint.__name__}, got {value!r}")  # type: ignore[union-attr]
        return build(hint, value, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(path, f"must be of type {hint.__name__}, got {value!r}")
    return value
