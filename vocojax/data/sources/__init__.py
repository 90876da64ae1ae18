"""Sources of samples, all with one interface (`base.Source`); `open_source` opens those that a data config names."""

from collections.abc import Callable
from pathlib import Path

from vocojax.config import ConfigError
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.file_checks import require_some_files
from vocojax.data.sources.base import Sample, Source
from vocojax.data.sources.columnar import file_digest, sampled_digest
from vocojax.data.sources.easy_vqa import EasyVqaCaptions, EasyVqaSource
from vocojax.data.sources.easy_vqa_clips import EasyVqaClips
from vocojax.data.sources.llava import LlavaSource
from vocojax.data.sources.mixture import MixtureSource
from vocojax.data.sources.mosaic import MosaicSource
from vocojax.data.sources.shikra import ShikraSource
from vocojax.data.sources.video_chatgpt import VideoChatGptSource
from vocojax.data.sources.webvid import WebVidSource

__all__ = ["EasyVqaSource", "LlavaSource", "Sample", "Source", "file_digest", "identity", "open_source",
           "sampled_digest"]


def open_source(data: DataConfig) -> Source:
    """Opens the source of a data config, or the mixture of its parts.

    Raises:
      ConfigError: a source can't be opened; the message names it.
    """
    if not data.mixture:
        return _open(data, data, "data")
    parts = [(_open(part, data, f"data.mixture[{i}]"), part.weight) for i, part in enumerate(data.mixture)]
    return MixtureSource(parts)


def identity(part: DataConfig | PartConfig, digest: Callable[[Path], str] = file_digest) -> str:
    """Returns a digest of the file that a source reads, wherever it is; '' for the data of a package.

    Args:
      part: the source.
      digest: `sampled_digest` to compare with what version 0.1 saved.
    """
    path = Path(part.path) / "manifest.json" if part.source == "tfds" else Path(part.path)
    return digest(path) if part.path and path.is_file() else ""


def _open(part: DataConfig | PartConfig, data: DataConfig, key: str) -> Source:
    name, files = part.source, (part.path, part.image_root)
    try:
        source = _open_as(name, part, files, data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}.path", f"must be readable as {name!r}: {error}") from error
    require_some_files(source, part, key)
    return source


def _open_as(name: str, part: DataConfig | PartConfig, files: tuple[str, str], data: DataConfig) -> Source:
    if name == "easy_vqa_captions":
        return EasyVqaCaptions(part.split)
    if name == "easy_vqa":
        return EasyVqaSource(part.split, part.threads_per_sample)
    if name == "easy_vqa_clips":
        return EasyVqaClips(part.split, part.threads_per_sample, data.frames)
    if name in ("mosaic", "mosaic_captions"):
        return MosaicSource(part.split, part.threads_per_sample, captions=name == "mosaic_captions")
    if name == "webvid":
        return WebVidSource(*files)
    if name == "video_chatgpt":
        return VideoChatGptSource(*files)
    if name == "shikra_rec":
        return ShikraSource(*files, "rec", data.fit)
    if name == "shikra_reg":
        return ShikraSource(*files, "reg", data.fit)
    if name == "shikra_pointqa":
        return ShikraSource(*files, "pointqa", data.fit)
    if name == "tfds":
        from vocojax.data.sources.tfds.reader import TfdsSource  # an optional dependency

        return TfdsSource(part.path, part.split)
    return LlavaSource(*files)
