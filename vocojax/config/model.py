"""The configuration of a model: frozen dataclasses, checked where they are built."""

import re
from dataclasses import dataclass, field
from typing import Literal

from vocojax.config.reader import ConfigError, require, require_positive


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
