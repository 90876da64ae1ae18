"""The configuration of a model: frozen dataclasses that check their values when they are built."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from vocojax.config.reader import ConfigError, require, require_positive, require_positive_number


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, by default CLIP's ViT-L/14 at 336 px.

    Attributes:
      kind: `clip` (arXiv 2103.00020) or `eva` (EVA-CLIP, arXiv 2303.15389). BLIP-2 and LLaMA-VID use EVA-CLIP's last
        block without a final norm, so `depth` counts only the blocks that are run and `select_layer` is -1.
      image_size: edge of the square images, in pixels.
      patch_size: edge of a patch, in pixels.
      width: width of the hidden states.
      depth: number of blocks.
      num_heads: attention heads of a block.
      mlp_width: width of an MLP's hidden layer.
      select_layer: the hidden state that feeds the projector; -1 is the last block's output.
      norm_eps: epsilon of the layer norms.
    """

    kind: Literal["clip", "eva"] = "clip"
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    select_layer: int = -2
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "patch_size", "width", "depth", "num_heads", "mlp_width")
        require_positive_number(self, "norm_eps")
        require(self.image_size % self.patch_size == 0, "image_size", f"must be a multiple of {self.patch_size}",
                self.image_size)
        require(self.width % self.num_heads == 0, "num_heads", f"must divide width {self.width}", self.num_heads)
        lowest = -self.depth if self.kind == "clip" else -1
        require(lowest <= self.select_layer <= -1, "select_layer", f"must be in [{lowest}, -1]", self.select_layer)

    @property
    def grid(self) -> int:
        """Number of patches on a side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of vision tokens of one image."""
        return self.grid**2


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector, which maps vision features to decoder embeddings.

    Attributes:
      kind: `linear` (one linear layer) or `mlp2x_gelu` (LLaVA-1.5's two linear layers with a GELU between them).
    """

    kind: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"


@dataclass(frozen=True)
class RopeScalingConfig:
    """The scaling of rotary frequencies for longer contexts.

    Attributes:
      kind: `llama3` divides the low frequencies by `factor` (Llama 3.1); `linear` divides all of them (Vicuna-16k) and
        ignores the other fields.
      factor: divisor of the frequencies.
      low_freq_factor: frequencies of fewer than this many periods in `original_max_positions` are divided by `factor`.
      high_freq_factor: frequencies of more than this many periods stay; between the two the scaling is interpolated.
      original_max_positions: context length before scaling, in tokens.
    """

    kind: Literal["llama3", "linear"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        require_positive_number(self, "factor", "low_freq_factor", "high_freq_factor")
        require_positive(self, "original_max_positions")
        require(self.factor >= 1, "factor", "must be >= 1", self.factor)
        require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor",
                f"must be above low_freq_factor {self.low_freq_factor}", self.high_freq_factor)


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA decoder, by default Vicuna-7B's with one more row for `<voco>`.

    Attributes:
      vocab_size: rows of the vocabulary, with `<voco>` and padding.
      vocab_padding: last rows of the vocabulary that have no token; they make `vocab_size` divisible among devices.
      width: width of the hidden states, E.
      depth: number of blocks, L.
      num_heads: query heads, H.
      num_kv_heads: key/value heads, G.
      head_width: width of a head, D.
      mlp_width: width of the MLP's hidden layer, F.
      rope_theta: base of the rotary frequencies.
      rope_scaling: scaling of the rotary frequencies for longer contexts, or None.
      norm_eps: epsilon of the RMS norms.
      tie_embeddings: whether the head is the transposed embedding.
      max_positions: context length it was trained for, in tokens. Exports carry it, and it limits how many
        frames a video session keeps.
    """

    vocab_size: int = 32001
    vocab_padding: int = 0
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
    max_positions: int = 4096

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "width", "depth", "num_heads", "num_kv_heads", "head_width", "mlp_width",
                         "max_positions")
        require_positive_number(self, "rope_theta", "norm_eps")
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads {self.num_heads}",
                self.num_kv_heads)
        require(0 <= self.vocab_padding < self.vocab_size, "vocab_padding",
                f"must be in [0, vocab_size {self.vocab_size})", self.vocab_padding)
        require(self.head_width % 2 == 0, "head_width", "must be even for rotary positions", self.head_width)

    @property
    def num_tokens(self) -> int:
        """Number of rows of the vocabulary that have a token."""
        return self.vocab_size - self.vocab_padding


Positions = Literal["compact", "sequential"]
VocoInit = Literal["learned", "pool", "pool_nested"]
VocoRows = Literal["shared", "own"]
VocoPlaces = Literal["end", "spread"]
VocoSees = Literal["unit", "band"]
VocoReads = Literal["input", "output"]


def levels_of(num_vocos: int) -> tuple[int, ...]:
    """Returns the powers of two below a number of VoCo tokens, and the number itself."""
    return (*(1 << power for power in range((num_vocos - 1).bit_length())), num_vocos)


@dataclass(frozen=True)
class VocoConfig:
    """The VoCo tokens.

    Attributes:
      num_vocos: VoCo tokens after the vision tokens of each unit, N.
      token_id: their row in the vocabulary.
      positions: rotary positions of several units (images, frames). `compact`: unit t has those of the first one, t * N
        higher, so the VoCo tokens of all units are consecutive, and a context is spent only on them. `sequential`: all
        tokens are numbered one after the other, as if nothing were compressed.
      init: the input embedding of a VoCo token. `learned`: its row of the vocabulary, as in the paper. `pool`: that row
        plus the mean of the projected vision tokens in the VoCo token's window, so that the model begins as pooling.
        The N windows are a grid over the image's patches, as square as N allows; VoCo token n has window n, row after
        row. `pool_nested`: as `pool` with windows that do not depend on N, for a model that reads any number of its
        tokens: the whole image, then its four quarters, then the 16 quarters of these, and so on. Runs and caches keep
        the choice. The original layout has only `learned`.
      rows: how the VoCo tokens of a unit differ before the first layer. `shared`: not at all, as in the paper; all have
        the one row of `<voco>`. `own`: VoCo token n adds row n of the parameter `decoder/voco_offsets` [N, E], which
        trains with the embedding. A stage that starts from a model without it lists it in `init_new`. Runs and caches
        keep the choice. The released code's layout has only `shared`.
      places: rotary positions of a unit's VoCo tokens. `end`: after its other tokens, as in the paper. `spread`: those
        of the vision tokens in the middle of N equal parts. Where a unit's text begins does not change.
      sees: which vision tokens a VoCo token sees. `unit`: all of its unit, as in the paper. `band`: one of N equal
        parts, in the order of the patches a band of the image; the first VoCo token sees the last band. It also sees
        the newline and the VoCo tokens before it.
      reads: what the text in layer i reads of a VoCo token. `input`: keys and values of its state before the layer, as
        in the paper. `output`: of its state after the layer, so that the text reads what this layer has gathered. Such
        a model is trained with the plan `two_stage`, and read from caches alone.
    """

    num_vocos: int = 1
    token_id: int = 32000
    positions: Positions = "compact"
    init: VocoInit = "learned"
    rows: VocoRows = "shared"
    places: VocoPlaces = "end"
    sees: VocoSees = "unit"
    reads: VocoReads = "input"

    def __post_init__(self) -> None:
        require_positive(self, "num_vocos")
        require(self.token_id >= 0, "token_id", "must be >= 0", self.token_id)

    @property
    def is_nested(self) -> bool:
        """Whether a unit's first VoCo tokens are the same however many there are."""
        return (self.init, self.places, self.sees) == ("learned", "end", "unit")

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of VoCo tokens that elastic training draws and `vocos="auto"` reads: 1, 2, 4, ... and N."""
        return levels_of(self.num_vocos)

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of the windows that `init="pool"` gives the VoCo tokens; of `pool_nested`, the finest."""
        if self.init == "pool_nested":
            side = 1
            while (4 * side**2 - 1) // 3 < self.num_vocos:  # 1 + 4 + 16 + ... + side^2 windows
                side *= 2
            return side, side
        rows = max(side for side in range(1, math.isqrt(self.num_vocos) + 1) if self.num_vocos % side == 0)
        return rows, self.num_vocos // rows


# What the paper's VoCo tokens are. Entries with these values are in no fingerprint; the others are our recipes.
PAPER_VOCO = {"init": "learned", "rows": "shared", "places": "end", "sees": "unit", "reads": "input"}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): a target kernel W acts as W + (alpha / rank) A B.

    Attributes:
      rank: rank of A and B; 0 is no LoRA.
      alpha: scales A B.
      targets: regexes of the paths of linear layers' kernels; a regex must match the whole path.
      dropout: share of the elements of A's input that training sets to 0, as PEFT's `lora_dropout`; the others are
        divided by 1 - dropout. Only for targets in the decoder's layers. Nothing is dropped in validation, inference
        and merged weights.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("decoder/blocks/.*/kernel",)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", "must be >= 1, or 0 for no LoRA", self.rank)
        require(0 < self.alpha < math.inf, "alpha", "must be > 0", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "must be >= 0 and < 1", self.dropout)
        require(bool(self.targets) or not self.rank, "targets", "must name the kernels that get factors", self.targets)
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError("targets", f"has the invalid regex {pattern!r}: {error}") from None

    @property
    def scale(self) -> float:
        """Multiplier of the factors' product, alpha / rank; 0 without LoRA."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class CompressorConfig:
    """A compressor, which shortens an image's vision tokens before the decoder. Only baselines have one (paper §4.2).

    Its compressed tokens replace the vision tokens; there are no VoCo tokens then.

    Attributes:
      kind: `none` (the decoder compresses into VoCo tokens), or a baseline. `avg_pool`: means of the vision tokens in
        square windows. `qformer`: BLIP-2's Q-Former. `downsample`: the vision tokens of a smaller image, which the same
        tower encodes with interpolated position embeddings. `random`: some of the vision tokens, drawn for each image
        and each training step. In evaluation the draw depends only on the image. `llama_vid` (arXiv 2311.17043): one
        context token, made for the sample's first question, and means in square windows.
      num_tokens: compressed tokens of an image; a square number for `avg_pool`, whose side divides the tower's patches
        on a side, and for `downsample`; for `llama_vid` one more than such a number.
      num_queries: queries of `llama_vid`'s Q-Former; `qformer` has `num_tokens`.
      question_tokens: how many of a question's last tokens guide `llama_vid`.
      depth: number of the Q-Former's blocks; its defaults are BLIP-2's.
      width: width of the Q-Former's hidden states.
      num_heads: attention heads of a Q-Former's block.
      mlp_width: width of the hidden layer of the Q-Former's MLPs.
      cross_attention_every: of each group of this many blocks, the first has cross-attention to the vision tokens.
      norm_eps: epsilon of the Q-Former's layer norms.
    """

    kind: Literal["none", "avg_pool", "qformer", "downsample", "random", "llama_vid"] = "none"
    num_tokens: int = 1
    num_queries: int = 32
    question_tokens: int = 64
    depth: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    cross_attention_every: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        require_positive(self, "num_tokens", "num_queries", "question_tokens", "depth", "width", "num_heads",
                         "mlp_width", "cross_attention_every")
        require_positive_number(self, "norm_eps")
        require(self.width % self.num_heads == 0, "num_heads", f"must divide width {self.width}", self.num_heads)
        if self.kind in ("avg_pool", "downsample"):
            require(self.content_grid**2 == self.num_tokens, "num_tokens", f"must be a square number for {self.kind}",
                    self.num_tokens)
        if self.kind == "llama_vid":
            require(self.num_tokens > 1 and self.content_grid**2 == self.num_tokens - 1, "num_tokens",
                    "must be one more than a square number for llama_vid: the context token, and content tokens",
                    self.num_tokens)
        if self.kind in ("qformer", "llama_vid"):
            require(self.depth % self.cross_attention_every == 0, "depth",
                    f"must be a multiple of cross_attention_every {self.cross_attention_every}", self.depth)

    @property
    def reads_text(self) -> bool:
        """Whether the compressed tokens depend on the question."""
        return self.kind == "llama_vid"

    @property
    def queries(self) -> int:
        """Number of the Q-Former's queries."""
        return self.num_queries if self.reads_text else self.num_tokens

    @property
    def content_grid(self) -> int:
        """Number of windows, or patches of a smaller image, on a side, where their tokens are a square number."""
        return math.isqrt(self.num_tokens - self.reads_text)


@dataclass(frozen=True)
class ModelConfig:
    """A VoCo-LLaMA.

    Attributes:
      vision: the vision tower.
      projector: maps vision features to decoder embeddings.
      decoder: the language model.
      voco: the VoCo tokens.
      compressor: a baseline's compressor.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    voco: VocoConfig = field(default_factory=VocoConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)

    def __post_init__(self) -> None:
        require(self.voco.token_id < self.decoder.num_tokens, "voco.token_id",
                f"must be below {self.decoder.num_tokens}, the decoder's vocab_size without padding",
                self.voco.token_id)
        kind, tokens, vision = self.compressor.kind, self.compressor.num_tokens, self.vision
        if self.voco.init != "learned" and kind == "none":
            rows, columns = self.voco.windows
            require(columns <= vision.grid, "voco.num_vocos", f"has {rows} x {columns} windows for voco.init "
                    f"{self.voco.init!r}, more than the tower's {vision.grid} patches on a side; take another number",
                    self.voco.num_vocos)
        if self.voco.sees == "band" and kind == "none":
            require(self.voco.num_vocos <= vision.num_patches, "voco.num_vocos",
                    f"must be <= {vision.num_patches}, the vision tokens, for voco.sees 'band'", self.voco.num_vocos)
        if kind in ("downsample", "random"):
            require(tokens <= vision.num_patches, "compressor.num_tokens",
                    f"must be <= {vision.num_patches}, the tower's patches, for {kind}", tokens)
        if kind in ("avg_pool", "llama_vid"):
            require(vision.grid % self.compressor.content_grid == 0, "compressor.num_tokens",
                    f"must be the square of a divisor of {vision.grid}, the tower's patches on a side"
                    f"{', plus one' * (kind == 'llama_vid')}, for {kind}", tokens)

    @property
    def tower_grid(self) -> int:
        """Number of patches on a side of the images that the tower encodes: fewer than its own for `downsample`."""
        return self.compressor.content_grid if self.compressor.kind == "downsample" else self.vision.grid

    @property
    def question_tokens(self) -> int:
        """Number of a question's tokens that its images are compressed for; 0 if they do not depend on it."""
        return self.compressor.question_tokens if self.compressor.reads_text else 0

    @property
    def unit_tokens(self) -> int:
        """Number of one image's vision tokens, or of a baseline's compressed tokens."""
        return self.vision.num_patches if self.compressor.kind == "none" else self.compressor.num_tokens

    @property
    def unit_vocos(self) -> int:
        """Number of VoCo tokens of one unit; 0 for a baseline, which has a compressor instead."""
        return self.voco.num_vocos if self.compressor.kind == "none" else 0

    @property
    def voco_offsets(self) -> int:
        """Number of rows of `decoder/voco_offsets`, one for each VoCo token of a unit; 0 if they share one row."""
        return self.unit_vocos if self.voco.rows == "own" else 0
