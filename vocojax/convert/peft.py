"""LoRA adapters in the directories that PEFT and LLaVA's LoRA scripts write, read as part of their base model.

    adapter_config.json            rank, alpha, dropout (of training alone), and the base model's name
    adapter_model.safetensors      the factors (.bin in older ones), and whole tensors (`modules_to_save`)
    non_lora_trainables.bin        LLaVA: whole tensors that were trained as well, such as the projector

PEFT puts `base_model.model.` before the names of the base model's modules.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vocojax.convert.huggingface import Json, read_json, typed
from vocojax.convert.tables import HUGGINGFACE_ALIASES
from vocojax.convert.tensor_files import open_file
from vocojax.errors import ConvertError
from vocojax.weights import Index, Shape, Weights

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OTHERS = ("non_lora_trainables.safetensors", "non_lora_trainables.bin", "mm_projector.bin")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# Entries that change what an adapter computes, and the values with which they do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (None, False), "fan_in_fan_out": (None, False), "lora_bias": (None, False),
    "layer_replication": (None,), "trainable_token_indices": (None,), "bias": (None, "none"),
    "target_parameters": (None, []), "use_qalora": (None, False), "alora_invocation_tokens": (None,),
}


def is_adapter(directory: Path) -> bool:
    """Returns whether a directory holds an adapter, and not a whole model."""
    return (directory / CONFIG).is_file() and any((directory / name).is_file() for name in _FILES)


def base_name(directory: Path) -> tuple[str, str | None]:
    """Returns the name of an adapter's base model, a directory or a repository on the hub, and its revision there.

    The name is '' if the adapter has none.

    Raises:
      ConvertError: the adapter's config can't be read.
    """
    values, where = read_json(directory / CONFIG), str(directory / CONFIG)
    return (typed(values, "base_model_name_or_path", str, "", where), typed(values, "revision", str, "", where) or None)


def plain_name(name: str) -> str:
    """Returns a tensor's name in the base model."""
    name = re.sub(r"^base_model\.model\.", "", name)
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name)


class Pair(NamedTuple):
    """The factors of a tensor: W [out, in] acts as W + scale B A.

    Attributes:
      a: name of A [rank, in] in the adapter.
      b: name of B [out, rank].
      scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.
    """

    a: str
    b: str
    scale: float


class AdaptedTensors:
    """The tensors of a base model with an adapter's merged in.

    Args:
      base: the base model's tensors.
      directory: the adapter's.

    Attributes:
      where: the files, for errors.
      shapes: shapes of the tensors by the base model's names.

    Raises:
      ConvertError: the adapter is of another kind than LoRA on linear layers, or does not fit its base.
    """

    def __init__(self, base: Weights, directory: Path):
        self._base = base
        self._adapter = open_file(next(directory / name for name in _FILES if (directory / name).is_file()))
        self.where = f"{base.where} + {self._adapter.where}"
        config = _read_config(directory)
        homes = {_canonical(name): name for name in base.shapes}

        def in_base(name: str) -> str:
            return name if name in base.shapes else homes.get(_canonical(name), name)

        self._whole: dict[str, tuple[Weights, str]] = {}
        sides: dict[str, dict[str, str]] = {}
        for name in self._adapter.shapes:
            if found := _FACTOR.fullmatch(plain_name(name)):
                sides.setdefault(found[1], {})[found[2]] = name
            elif "lora_" in name:
                raise ConvertError(f"{self._adapter.where}: tensor {name} is of a kind of adapter that is not read; "
                                   "merge it into its base with PEFT's merge_and_unload")
            else:
                self._whole[in_base(plain_name(name))] = self._adapter, name
        for file in (directory / name for name in _OTHERS):
            if file.is_file():
                others = open_file(file)
                self._whole |= {in_base(plain_name(name)): (others, name) for name in others.shapes}
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in base.shapes.items()}
        self.shapes |= {name: tuple(part.shapes[own]) for name, (part, own) in self._whole.items()}
        self._pairs = {in_base(f"{module}.weight"): self._pair(module, pair, config) for module, pair in sides.items()}
        for name, pair in self._pairs.items():
            self._require_fit(name, pair)

    def dtype(self, name: str) -> np.dtype:
        """Returns the tensor's dtype: for merged ones the base's."""
        part, own = self._whole.get(name, (self._base, name))
        return part.dtype(own)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or the slice of it at `index`; factors are merged in float32."""
        part, own = self._whole.get(name, (self._base, name))
        value = part.read(own, index)
        if name not in self._pairs:
            return value
        pair = self._pairs[name]
        rows, columns = (slice(None), slice(None)) if index is None else index
        b, a = (self._adapter.read(factor).astype(np.float32) for factor in (pair.b, pair.a))
        return (value.astype(np.float32) + pair.scale * (b[rows] @ a[:, columns])).astype(value.dtype)

    def _pair(self, module: str, sides: Mapping[str, str], config: Json) -> Pair:
        if len(sides) < 2:
            raise ConvertError(f"{self._adapter.where}: {module} has only one of lora_A and lora_B; copy the file "
                               "again")
        rank = self._adapter.shapes[sides["A"]][0]
        alpha = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
        return Pair(sides["A"], sides["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def _require_fit(self, name: str, pair: Pair) -> None:
        if name not in self.shapes:
            raise ConvertError(f"{self._adapter.where}: factors for {name}, which {self._base.where} does not have; "
                               "pass the model that the adapter was trained on as --base")
        a, b = self._adapter.shapes[pair.a], self._adapter.shapes[pair.b]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != self.shapes[name]:
            raise ConvertError(f"{self._adapter.where}: factors {list(b)} x {list(a)} for {name} of shape "
                               f"{list(self.shapes[name])}; pass the model that the adapter was trained on as --base")


def _read_config(directory: Path) -> Json:
    values, where = read_json(directory / CONFIG), str(directory / CONFIG)
    for key, allowed in _PLAIN.items():
        if values.get(key) not in allowed:
            raise ConvertError(f"{where}: {key} is {values.get(key)!r}, which is not supported here; merge the adapter "
                               "into its base with PEFT's merge_and_unload")
    alpha = values.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConvertError(f"{where}: lora_alpha must be a number, got {alpha!r}; copy the file again")
    dropout = values.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConvertError(f"{where}: lora_dropout must be a number >= 0 and < 1, got {dropout!r}; copy the file again")
    return values


def _of_module(patterns: Any, module: str, default: float) -> float:
    """Returns the value of the first pattern that a module's name ends with, as PEFT does, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def _canonical(name: str) -> str:
    """Returns one name for a tensor that transformers' versions call differently."""
    for pattern, replacement in HUGGINGFACE_ALIASES:
        name = re.sub(pattern, replacement, name)
    return name
