"""The `data` part of a stage's configuration."""

from dataclasses import dataclass
from typing import Literal

from vocojax.config import require, require_positive
from vocojax.data.conversation import TEMPLATES
from vocojax.data.frame_choice import Sampling
from vocojax.data.images import Fit

SourceName = Literal["llava", "easy_vqa", "easy_vqa_captions", "easy_vqa_clips", "mosaic", "mosaic_captions", "webvid",
                     "video_chatgpt", "shikra_rec", "shikra_reg", "shikra_pointqa", "tfds"]
Split = Literal["train", "validation", "test"]
Plan = Literal["single_pass", "two_stage"]  # rows hold whole samples, or their text after a prefix of compressed units


@dataclass(frozen=True)
class PartConfig:
    """One source of a mixture.

    Attributes:
      source: as in `DataConfig`.
      split: as in `DataConfig`.
      path: as in `DataConfig`.
      image_root: as in `DataConfig`.
      threads_per_sample: as in `DataConfig`.
      weight: how often each record of the source is in an epoch; may be a fraction.
    """

    source: SourceName = "llava"
    split: Split = "train"
    path: str = ""
    image_root: str = ""
    threads_per_sample: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", "must be > 0", self.weight)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become rows.

    Attributes:
      source: the kind of source. Those whose names begin with `easy_vqa` or `mosaic` come from the package `easy-vqa`,
        `tfds` from a directory. All others read a file (`path`) and the images or videos that it names (below
        `image_root`).
      mixture: several sources with weights, in place of `source` and its fields.
      split: split to read, for the sources from the package `easy-vqa` and for `tfds`.
      path: a JSON of LLaVA's or Video-ChatGPT's form, WebVid's CSV or Shikra's jsonl; for `tfds` the directory that
        `vocojax prepare_data` wrote.
      image_root: directory that the file names of images and videos are relative to.
      tokenizer: directory of a Hugging Face tokenizer, or `hf://org/name`.
      threads_per_sample: for `easy_vqa` and the mosaics, the most questions about an image in one sample; None for no
        limit. For `easy_vqa_clips`, the number of questions about a clip; None for 24. It changes nothing for other
        sources, where a record is one conversation: write a record per question.
      template: how a conversation becomes text. `vicuna_v1`: system prompt, USER: question ASSISTANT: answer</s>, as
        LLaVA-1.5. `released`: the same as VoCo-LLaMA's released code writes it, which deletes newlines. `short`: as
        `vicuna_v1` without a system prompt. `bare`: question and answer without roles. `plain`: only the answer, a
        caption. `vocojax check_data` shows the tokens that it makes.
      row_length: tokens per row; with the stage's `plan="two_stage"` tokens of text, as units have their own room.
      images_per_row: the most units (images, tiles, frames) per row.
      max_targets: the most targets per row; None for `row_length`.
      packers: number of packers that the records are dealt to; None for one per row of a batch. It must divide the rows
        of a batch and be a multiple of the number of processes. Batches depend on it, so a run can't change it.
      pack_window: number of samples from which a packer chooses those that fill a row.
      fit: how an image becomes square. `pad`: in the middle of a square of CLIP's mean colour (LLaVA-1.5); `pad_white`:
        of a white one (Shikra); `crop`: the middle square (CLIP); `square`: the aspect ratio changes; `anyres`: the
        whole image and its tiles, each a unit (LLaVA-1.6).
      frames: the most units per video; each counts for `images_per_row`. A shorter video has as many as it has frames.
        For `easy_vqa_clips`, the most frames of a clip.
      frame_sampling: which frames. `uniform`: from the first to the last at equal distances; `segments`: the middles of
        equal segments (Video-ChatGPT); `fps`: one per second, thinned evenly to `frames` (LLaMA-VID).
      fewest_vocos: each sample's text reads a random number of its units' VoCo tokens, the first ones, and is trained
        to answer from them alone: one of 1, 2, 4, ... and N from this number on (`VocoConfig.levels`), drawn again in
        every epoch. Such a model reads any number of them (elastic). None: text reads all N.
      anneal_samples: samples over which the fewest goes down from N to `fewest_vocos`; 0: none.
      frame_jitter: draw each frame among those nearest to the chosen one, again in every epoch. For training only.
      video_seconds: a video that takes longer to read is skipped. This is the last resort against a disk that hangs,
        and the only way in which a machine's load can change the stream; a video of too many pixels is refused before.
      num_threads: threads that read and decode, in each worker process if there are any.
      num_workers: processes that make batches; 0 for threads of the training process. Workers need parsed absl flags.
      keep_in_memory: keep every prepared sample in memory, for small data sets.
      max_skipped_share: a run stops when more than this share of the records can't be used; the share is taken of the
        records read so far, and of 1,000 while they are fewer.
    """

    source: SourceName = "llava"
    mixture: tuple[PartConfig, ...] = ()
    split: Split = "train"
    path: str = ""
    image_root: str = ""
    tokenizer: str = ""
    threads_per_sample: int | None = None
    template: str = "vicuna_v1"
    row_length: int = 2048
    images_per_row: int = 4
    max_targets: int | None = None
    packers: int | None = None
    pack_window: int = 64
    fit: Fit = "pad"
    frames: int = 8
    frame_sampling: Sampling = "uniform"
    fewest_vocos: int | None = None
    anneal_samples: int = 0
    frame_jitter: bool = False
    video_seconds: float = 120.0
    num_threads: int = 16
    num_workers: int = 0
    keep_in_memory: bool = False
    max_skipped_share: float = 0.01

    def __post_init__(self) -> None:
        require_positive(self, "row_length", "images_per_row", "pack_window", "num_threads", "frames")
        require(self.max_targets is None or self.max_targets >= 1, "max_targets", "must be >= 1", self.max_targets)
        require(self.packers is None or self.packers >= 1, "packers", "must be >= 1", self.packers)
        require(self.num_workers >= 0, "num_workers", "must be >= 0", self.num_workers)
        require(self.threads_per_sample is None or self.threads_per_sample >= 1, "threads_per_sample", "must be >= 1",
                self.threads_per_sample)
        require(self.fewest_vocos is None or self.fewest_vocos >= 1, "fewest_vocos", "must be >= 1, or none",
                self.fewest_vocos)
        require(self.anneal_samples >= 0, "anneal_samples", "must be >= 0", self.anneal_samples)
        require(not self.anneal_samples or self.fewest_vocos is not None, "anneal_samples",
                "must be 0 without fewest_vocos", self.anneal_samples)
        require(self.video_seconds > 0, "video_seconds", "must be > 0", self.video_seconds)
        require(not (self.frame_jitter and self.keep_in_memory), "frame_jitter", "must be off with keep_in_memory, "
                "which keeps the frames of the first epoch", self.frame_jitter)
        require(self.template in TEMPLATES, "template", f"must be one of {sorted(TEMPLATES)}", self.template)
        require(0 <= self.max_skipped_share <= 1, "max_skipped_share", "must be in [0, 1]", self.max_skipped_share)

    @property
    def target_slots(self) -> int:
        """The number of targets that a row has room for."""
        return self.max_targets or self.row_length
