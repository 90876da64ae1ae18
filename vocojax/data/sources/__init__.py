"""Sources of samples. One interface: random access and length; `open_source` picks one by name."""

from vocojax.data.sources.base import Sample, Source
from vocojax.data.sources.easy_vqa import EasyVqaSource
from vocojax.data.sources.llava import LlavaSource

__all__ = ["EasyVqaSource", "LlavaSource", "Sample", "Source"]
