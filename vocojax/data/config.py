"""The `data` part of a stage's configuration."""

from dataclasses import dataclass
from typing import Literal

from vocojax.config import require, require_positive
from vocojax.data.conversation import TEMPLATES
from vocojax.data.images import Fit
from vocojax.data.videos import Sampling

SourceName = Literal["llava", "easy_vqa", "easy_vqa_captions", "webvid", "video_chatgpt", "shikra_rec", "shikra_reg",
                     "shikra_pointqa", "tfds"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class PartConfig:
    """A source in a mixture: its fields as in `DataConfig`; weight: how often each of its records is in an epoch."""

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

    source: `easy_vqa` and `easy_vqa_captions` read `split` of the package's data, `tfds` that of the data set which
      `launch/prepare_data.py` wrote to the directory `path`; all others `path` (a JSON of LLaVA's
      or Video-ChatGPT's form, WebVid's CSV, Shikra's jsonl) and the images or videos below `image_root`.
    mixture: several sources with weights, in place of `source` and its fields.
    tokenizer: directory of a Hugging Face tokenizer.
    threads_per_sample: `easy_vqa`: how many questions share an image in one sample at most; None for all of its.
    template: how a conversation is written out, see `data/conversation.py`.
    row_length, images_per_row, max_targets: static shape of a packed row; `max_targets` None allows every token.
    lanes: packers that the records are dealt to; None for one per row of a batch. A batch's rows must be a multiple of
      it, and it of the number of processes. What a batch holds depends on it, so a run keeps it.
    pack_window: samples among which a lane seeks those that fill a row.
    fit: how an image becomes square, see `images.prepare`; with `anyres` every tile is a unit.
    frames: units of a video (at most so many, where `frame_sampling` is `fps`), each counted by `images_per_row`.
    frame_sampling: which frames, see `videos.choose_frames`.
    video_seconds: a video that takes longer to read is skipped: the last resort against a disk that hangs, and the one
      thing by which a machine's load could change the stream; `videos.MAX_DECODED` limits the work before that.
    num_threads: threads that read and decode, in every worker process if there are any.
    num_workers: processes that make batches; 0 for threads of this one. They need absl's flags to be parsed.
    keep_in_memory: keep every prepared sample, for small data sets.
    max_skipped_share: a run stops when more than this share of the records can't be used (at first, of 1,000 records:
      `Tally.TOLERANCE_FROM`).
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
    lanes: int | None = None
    pack_window: int = 64
    fit: Fit = "pad"
    frames: int = 8
    frame_sampling: Sampling = "uniform"
    video_seconds: float = 120.0
    num_threads: int = 16
    num_workers: int = 0
    keep_in_memory: bool = False
    max_skipped_share: float = 0.01

    def __post_init__(self) -> None:
        require_positive(self, "row_length", "images_per_row", "pack_window", "num_threads", "frames")
        require(self.max_targets is None or self.max_targets >= 1, "max_targets", "must be >= 1", self.max_targets)
        require(self.lanes is None or self.lanes >= 1, "lanes", "must be >= 1", self.lanes)
        require(self.num_workers >= 0, "num_workers", "must be >= 0", self.num_workers)
        require(self.threads_per_sample is None or self.threads_per_sample >= 1, "threads_per_sample", "must be >= 1",
                self.threads_per_sample)
        require(self.video_seconds > 0, "video_seconds", "must be > 0", self.video_seconds)
        require(self.template in TEMPLATES, "template", f"must be one of {sorted(TEMPLATES)}", self.template)
        require(0 <= self.max_skipped_share <= 1, "max_skipped_share", "must be in [0, 1]", self.max_skipped_share)

    @property
    def target_slots(self) -> int:
        """Targets that a row has room for."""
        return self.max_targets or self.row_length
