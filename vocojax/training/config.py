"""The configuration of a training stage, and how an ml_collections file becomes one."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vocojax.config import (
    PAPER_VOCO,
    ConfigError,
    LoraConfig,
    ModelConfig,
    build,
    require,
    require_positive,
    require_seed,
)
from vocojax.data.config import DataConfig, Plan, SourceName, Split
from vocojax.kernels.interval_attention.api import IMPLEMENTATIONS
from vocojax.layout import Visibility
from vocojax.models.stack import REMAT_POLICIES
from vocojax.parallel.mesh import MeshConfig

Dtype = Literal["float32", "bfloat16"]
SCORE = "validation/"  # a benchmark's score is logged as `validation/BENCHMARK`
HELD_OUT = ("validation/loss", "validation/accuracy")  # what is measured on held-out data
BEST_METRICS = ("loss", "cross_entropy", "kl", "accuracy", "grad_norm", *HELD_OUT)
LearningRate = tuple[str, float | Literal["freeze"]]
RateSchedule = Literal["cosine", "constant", "wsd"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, a schedule of the learning rate and clipping by the global norm.

    Attributes:
      learning_rate: at the end of the warm-up, of parameters whose multiplier is 1.
      warmup_share: share of the stage's steps in which the rate rises from 0.
      schedule: the rate after the warm-up. `cosine`: falls to 0 as half a cosine. `constant`: stays. `wsd`: stays, and
        falls to 0 as a line over the last `decay_share` of the steps (arXiv 2404.06395, §4).
      decay_share: for `wsd`, the share of the stage's steps in which the rate falls.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the second moment's root.
      weight_decay: decoupled, times the learning rate; norm scales and biases have none.
      clip_norm: of the gradients of everything that trains.
      ema: decay of the moving average of what trains: after each step it is ema x average + (1 - ema) x parameters, and
        before the first one the parameters. 0 keeps none. If there is one, it is what validation measures and what
        everything gets that reads the run (`vocojax.load`, an export, `init_from`, a teacher); only training itself
        resumes from the parameters. It takes 4 bytes per number that trains.
    """

    learning_rate: float = 2e-5
    warmup_share: float = 0.03
    schedule: RateSchedule = "cosine"
    decay_share: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", "must be > 0", self.learning_rate)
        require(0 <= self.warmup_share < 1, "warmup_share", "must be in [0, 1)", self.warmup_share)
        require(0 < self.decay_share <= 1, "decay_share", "must be in (0, 1]", self.decay_share)
        require(self.schedule != "wsd" or self.warmup_share + self.decay_share <= 1, "decay_share",
                f"must leave room for warmup_share {self.warmup_share:g}: together they are more than 1",
                self.decay_share)
        require(0 <= self.b1 < 1, "b1", "must be in [0, 1)", self.b1)
        require(0 <= self.b2 < 1, "b2", "must be in [0, 1)", self.b2)
        require(self.weight_decay >= 0, "weight_decay", "must be >= 0", self.weight_decay)
        require(self.clip_norm > 0, "clip_norm", "must be > 0", self.clip_norm)
        require(0 <= self.ema < 1, "ema", "must be in [0, 1); 0 keeps no average", self.ema)


@dataclass(frozen=True)
class DistillConfig:
    """Paper Eq. 1: a KL divergence to a frozen teacher that sees the vision tokens.

    Attributes:
      teacher: directory of the teacher (an upper bound's run, or a LLaVA in any layout); '' is no teacher and no KL.
      weight: of the KL, which is added to the cross-entropy.
      temperature: divides both models' logits; the KL is scaled by its square.
    """

    teacher: str = ""
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", "must be > 0; leave teacher empty for no KL", self.weight)
        require(self.temperature > 0, "temperature", "must be > 0", self.temperature)


@dataclass(frozen=True)
class CheckpointConfig:
    """The rules of when checkpoints are written and which of them are kept.

    The last step always gets one, and so does the step after which a run is stopped.

    Attributes:
      every: steps between checkpoints.
      minutes: a checkpoint is also written where metrics are logged if the last one is older; 0 is never.
      keep: how many of the newest are kept.
      keep_every: checkpoints of the steps that are multiples of this are never deleted; 0 is none.
      keep_best: how many are kept in addition, by `best_metric`; 0 is none.
      best_metric: the mean since metrics were last logged of `loss`, `cross_entropy`, `kl` (with a teacher), `accuracy`
        or `grad_norm`; or of the same step `validation/loss`, `validation/accuracy`, or `validation/BENCHMARK` with one
        of `validation.benchmarks` (of a file, its name without the suffix).
      best_is: whether the lowest or the highest value is the best.
    """

    every: int = 500
    minutes: float = 15.0
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "loss"
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        require_positive(self, "every", "keep")
        require(self.minutes >= 0, "minutes", "must be >= 0", self.minutes)
        require(self.keep_every >= 0, "keep_every", "must be >= 0", self.keep_every)
        require(self.keep_best >= 0, "keep_best", "must be >= 0", self.keep_best)
        is_score = self.best_metric.startswith(SCORE) and self.best_metric not in HELD_OUT
        require(is_score or self.best_metric in BEST_METRICS, "best_metric",
                f"must be one of {', '.join(BEST_METRICS)} or {SCORE}BENCHMARK", self.best_metric)
        require(not (self.keep_best and is_score) or self.best_is == "highest", "best_is",
                f"must be 'highest' to keep the best by {self.best_metric}", self.best_is)


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured while a run trains: held-out data, benchmarks and answers to fixed prompts.

    Held-out data's loss and accuracy are logged as `validation/loss` and `validation/accuracy`, benchmarks' scores as
    `validation/BENCHMARK`, some questions and answers with their pictures in TensorBoard and Weights & Biases. What is
    not named here is as in the stage's `data`.

    Attributes:
      every: steps between validations; 0 is never. The last step has one as well.
      batches: how many batches of `batch_size` rows; they are the same every time.
      source: as in `DataConfig`.
      split: as in `DataConfig`.
      path: as in `DataConfig`.
      image_root: as in `DataConfig`.
      ask_every: steps between two askings of `benchmarks` and `prompts`; 0 is never. The last step has one as well.
      benchmarks: names of benchmarks or groups of them (`vocojax evaluate --list`), or files of your own questions
        (.json, .jsonl), scored as `vocojax evaluate` does.
      data_root: directory of the benchmarks' official files, a folder per benchmark; for your own questions, of the
        images.
      questions: about how many of each benchmark are asked, evenly spread; they are the same every time.
      prompts: pairs (image file, question), whose answers are logged; '' for no image.
    """

    every: int = 0
    batches: int = 8
    source: SourceName = "llava"
    split: Split = "validation"
    path: str = ""
    image_root: str = ""
    ask_every: int = 0
    benchmarks: tuple[str, ...] = ()
    data_root: str = "data"
    questions: int = 200
    prompts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", "must be >= 0", self.every)
        require_positive(self, "batches", "questions")
        asks = bool(self.benchmarks or self.prompts)
        require(self.ask_every > 0 if asks else self.ask_every == 0, "ask_every",
                "must be > 0 to ask benchmarks and prompts, and 0 where there are none", self.ask_every)


@dataclass(frozen=True)
class RunConfig:
    """Runtime options that do not change the computation.

    Attributes:
      profile: the first and the last step of a trace written to WORKDIR/profile (`vocojax train --profile`); or empty.
      hang_seconds: after so long without a step the stacks of all threads are written to standard error.
      wandb_project: Weights & Biases project to log to as well; empty for none.
      compilation_cache: directory where compiled programs are kept, so that a run that is started again does not
        compile them again; a relative path is below the work directory, '' is none. Several runs may share one.
    """

    profile: tuple[int, ...] = ()
    hang_seconds: float = 900.0
    wandb_project: str = ""
    compilation_cache: str = "compiled"

    def __post_init__(self) -> None:
        is_span = len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
        require(not self.profile or is_span, "profile", "must be the first and the last step", self.profile)
        require(self.hang_seconds > 0, "hang_seconds", "must be > 0", self.hang_seconds)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
      name: shown in the progress bar and in Weights & Biases.
      data: what is trained on.
      learning_rates: pairs (regex, multiplier of `optimizer.learning_rate` or "freeze") over parameter paths such as
        `decoder/blocks/query/kernel`. A regex must match the whole path. The first that matches decides. Every
        parameter must be matched, and every regex must decide for at least one. On the command line:
        --config.learning_rates='[["vision/.*", "freeze"], [".*", 1.0]]'.
      steps: optimizer steps of the whole stage.
      model: what is trained.
      lora: factors for some kernels, which must be frozen; factors that `init_from` was trained with are merged.
      optimizer: AdamW's settings.
      distill: the KL divergence to a teacher.
      checkpoint: when checkpoints are written and which are kept.
      validation: loss on held-out data.
      mesh: devices along each axis.
      run: runtime options that do not change the computation.
      visibility: who sees whom in training: `voco`, or `causal` for the bounds and the baselines. The run keeps it: a
        model that was trained with `causal` is read so, unless `vocojax.load(RUN, visibility="voco")` asks for the
        other.
      closing: share of the steps in which the VoCo mask closes. At first the text of all rows sees whole images, as
        with `causal`; at every step fewer rows of a batch do; after this share of the steps, none. 0: it is closed from
        the start.
      plan: how a step computes the loss. `single_pass`: rows hold whole samples. `two_stage`: units run alone, and rows
        of text read their VoCo tokens' keys and values, so memory hardly grows with the number of frames. Both give the
        same loss and gradients; in two stages `data.row_length` counts text only.
      unit_chunk: for `two_stage`, how many units run at once on a device, at most; the largest divisor of a device's
        units (its rows x `data.images_per_row`) up to this is used.
      batch_size: rows per optimizer step.
      accumulate: parts that a batch is cut into, which run one after the other.
      init_from: directory of the parameters that this stage starts from, in any layout: an earlier stage's run, a
        Hugging Face or an original LLaVA directory; '' starts from random ones.
      init_new: regexes of parameters that are new, and so not taken from `init_from`.
      seed: of random parameters and of the order of the data.
      dtype: of the computation.
      frozen_dtype: of frozen parameters; those that train are fp32.
      remat: what the backward pass computes again. `full`: everything in a block; `minimal`: all but matrix products;
        `attention_out`: all but attention; `offload`: as `full`, with the blocks' inputs in the host's memory; `none`:
        nothing, which needs the most memory.
      attention: how attention is computed: `pallas_tpu`, `pallas_gpu`, `chunked` (XLA) or `reference` (dense, for
        tests); none picks by platform.
      log_every: steps between logged metrics.
    """

    name: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    learning_rates: tuple[LearningRate, ...] = ()
    steps: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)
    visibility: Visibility = "voco"
    closing: float = 0.0
    plan: Plan = "single_pass"
    unit_chunk: int = 8
    batch_size: int = 128
    accumulate: int = 1
    init_from: str = ""
    init_new: tuple[str, ...] = ()
    seed: int = 0
    dtype: Dtype = "bfloat16"
    frozen_dtype: Dtype = "bfloat16"
    remat: str = "full"
    attention: str | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "must say what the stage is called", self.name)
        require(bool(self.data.tokenizer), "data.tokenizer", "must name a tokenizer directory", self.data.tokenizer)
        if not self.data.mixture:
            _require_files(self.data, "data")
        if self.validation.every:
            _require_files(self.validation, "validation")
        if self.checkpoint.keep_best and self.checkpoint.best_metric in HELD_OUT:
            every = self.validation.every
            require(every > 0 and self.checkpoint.every % every == 0, "checkpoint.every",
                    f"must be a multiple of validation.every {every} > 0 to keep the best by "
                    f"{self.checkpoint.best_metric}", self.checkpoint.every)
        elif self.checkpoint.keep_best and self.checkpoint.best_metric.startswith(SCORE):
            every = self.validation.ask_every
            require(every > 0 and self.checkpoint.every % every == 0, "checkpoint.every",
                    f"must be a multiple of validation.ask_every {every} > 0 to keep the best by "
                    f"{self.checkpoint.best_metric}", self.checkpoint.every)
        if self.checkpoint.keep_best and self.checkpoint.best_metric == "kl":
            require(bool(self.distill.teacher), "checkpoint.best_metric",
                    "must be another one: without distill.teacher there is no KL", self.checkpoint.best_metric)
        require_positive(self, "steps", "batch_size", "accumulate", "unit_chunk", "log_every")
        require_seed(self.seed)
        require(self.batch_size % self.accumulate == 0, "accumulate", f"must divide batch_size {self.batch_size}",
                self.accumulate)
        require(self.remat in REMAT_POLICIES, "remat", f"must be one of {sorted(REMAT_POLICIES)}", self.remat)
        require(self.attention is None or self.attention in IMPLEMENTATIONS, "attention",
                f"must be one of {sorted(IMPLEMENTATIONS)}, or none", self.attention)
        for pattern, multiplier in self.learning_rates:
            require_regex("learning_rates", pattern)
            require(multiplier == "freeze" or multiplier > 0, "learning_rates",
                    f"has for {pattern!r} a multiplier that is not > 0; to keep parameters as they are say 'freeze'",
                    multiplier)
        require(any(multiplier != "freeze" for _, multiplier in self.learning_rates), "learning_rates",
                "must name what trains", self.learning_rates)
        for pattern in self.init_new:
            require_regex("init_new", pattern)
        if self.model.compressor.kind != "none":
            require(self.visibility == "causal", "visibility",
                    f"must be 'causal' for the baseline {self.model.compressor.kind!r}, which has no VoCo tokens",
                    self.visibility)
        require(0 <= self.closing <= 1, "closing", "must be in [0, 1]", self.closing)
        if self.closing:
            require((self.visibility, self.plan) == ("voco", "single_pass"), "closing", "must be 0 but for visibility "
                    "'voco' and plan 'single_pass': only there text can see whole images first", self.closing)
        if self.model.voco.reads == "output" and self.visibility == "voco":
            require(self.plan == "two_stage", "plan", "must be 'two_stage' for model.voco.reads 'output', which a "
                    "single pass can't compute", self.plan)
        require(self.data.fewest_vocos is None or self.visibility == "voco", "data.fewest_vocos",
                "must be none for visibility 'causal', whose text sees whole images", self.data.fewest_vocos)
        if self.plan == "two_stage":
            require(self.visibility == "voco", "visibility", "must be 'voco' for plan 'two_stage', whose units run "
                    "alone", self.visibility)
            require(not self.distill.teacher, "distill.teacher", "must be '' for plan 'two_stage': a teacher sees all "
                    "vision tokens, so use 'single_pass'", self.distill.teacher)

    @property
    def teacher_model(self) -> ModelConfig:
        """The model of `distill.teacher`: the stage's, with the VoCo tokens' embeddings as in the paper."""
        as_in_paper: Any = PAPER_VOCO
        return dataclasses.replace(self.model, voco=dataclasses.replace(self.model.voco, **as_in_paper))


def require_regex(key: str, pattern: str) -> None:
    """Raises `ConfigError` unless the pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(key, f"has the invalid regex {pattern!r}: {error}") from None


def _require_files(data: DataConfig | ValidationConfig, key: str) -> None:
    if not data.source.startswith(("easy_vqa", "mosaic")):
        require(bool(data.path), f"{key}.path", f"must name the file of a {data.source} source", data.path)
        require(bool(data.image_root) or data.source == "tfds", f"{key}.image_root",
                f"must name the directory of a {data.source} source's images or videos", data.image_root)


def stage_config(values: Mapping[str, Any], source: str = "") -> StageConfig:
    """Builds a stage's configuration.

    Args:
      values: a mapping, or an `ml_collections.ConfigDict`.
      source: the config file's name, for errors.

    Raises:
      ConfigError: the key is prefixed with `source`.
    """
    plain = json.loads(values.to_json()) if hasattr(values, "to_json") else values
    try:
        return build(StageConfig, plain)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.key}" if source else error.key, error.problem) from None


def all_keys(**values: Any) -> dict[str, Any]:
    """Returns a stage's config as nested dicts with every key there is: the given values over the defaults.

    Config files are made with it, so that each key can be set on the command line.
    """
    defaults: dict[str, Any] = {}
    for entry in dataclasses.fields(StageConfig):
        if entry.default_factory is dataclasses.MISSING:
            defaults[entry.name] = entry.default
        else:
            defaults[entry.name] = dataclasses.asdict(entry.default_factory())
    return _over(defaults, values)


def _over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` over `base`, dict by dict. Lists become tuples, which the command line can override."""
    merged = dict(base)
    for key, value in values.items():
        merged[key] = _over(base.get(key) or {}, value) if isinstance(value, Mapping) else value
    return {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}
