"""Export of a LoRA run as an adapter in PEFT's layout, for a base model in transformers' LLaVA layout.

    adapter_config.json          rank, alpha, the base model, and the modules below
    adapter_model.safetensors    the factors, and whole modules that differ from the base (PEFT's `modules_to_save`)

Factors are exported for the decoder's layers; factors of the projector are merged, since it is saved whole.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vocojax.config import LoraConfig
from vocojax.convert.huggingface import read_json
from vocojax.convert.mapping import Slot, Table
from vocojax.convert.safetensors_files import SafetensorsWriter
from vocojax.convert.tables import VOCABULARY, huggingface_module_name, without_padding
from vocojax.errors import ConvertError
from vocojax.hub import SCHEME, cached_copy, local_copy, repository
from vocojax.models.lora import factor_names
from vocojax.pretrained.source import Source, open_source, parameter_shapes
from vocojax.runs.weights import RunWeights
from vocojax.weights import check_tensors

_PREFIX = "base_model.model."  # PEFT's own, before the names of the base model
_LAYERS = "decoder/blocks/"


def base_name(base: str | Path) -> tuple[str, str | None]:
    """Returns a base model's name as `from_pretrained` takes it, an absolute path or `org/name`, and its revision."""
    if str(base).startswith(SCHEME):
        return repository(str(base))
    return str(Path(base).absolute()) if Path(base).is_dir() else str(base), None


def write_tensors(
    source: Source, directory: Path, table: Table, base: str | Path | None, dtype: str | None
) -> dict[str, Any]:
    """Writes the tensors of an adapter.

    The decoder's rows of the vocabulary are saved whole, as is every module that differs from the base's: what trained
    in addition to the factors, the projector for example.

    Args:
      source: a run that was trained with LoRA.
      directory: where the file is written.
      table: transformers' layout of the model.
      base: the model that the run was started from, in transformers' layout; a directory or a name on the hub.
      dtype: dtype of the tensors; None keeps each array's own.

    Returns:
      The content of `adapter_config.json`.

    Raises:
      ConvertError: the run has no factors, or the base is missing, has another layout, or is another model.
    """
    run = source.weights
    if not isinstance(run, RunWeights) or not run.lora.rank:
        raise ConvertError(f"{run.where}: has no LoRA factors, so it is no adapter; use --target_layout=huggingface")
    by_path: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in table.resolve(parameter_shapes(source.config)).items():
        by_path.setdefault(slot.path, []).append((huggingface_module_name(name), slot))
    adapted = {path for path in by_path if path.startswith(_LAYERS) and factor_names(path)[0] in run.stored.shapes}
    if not adapted:
        raise ConvertError(f"{run.where}: has LoRA factors outside the decoder's layers only, which an adapter can't "
                           "hold; use --target_layout=huggingface")
    whole = _modules_unlike(_open_base(source, base), run, by_path, adapted)
    tensors: dict[str, _Tensor] = {}
    for path, named in by_path.items():
        for name, slot in named:
            module, leaf = name.rsplit(".", 1)
            if path in adapted:
                for factor, side in zip(factor_names(path), "AB", strict=True):
                    shape = run.stored.shapes[factor][:0:-1]
                    kept = np.dtype(dtype) if dtype else run.stored.dtype(factor)
                    tensors[f"{_PREFIX}{module}.lora_{side}.{leaf}"] = _Tensor(factor, slot, shape, kept)
            elif module in whole:
                kept = np.dtype(dtype) if dtype else run.dtype(path)
                tensors[_PREFIX + name] = _Tensor(path, slot, slot.shape, kept)
    if source.config.decoder.tie_embeddings:  # PEFT would tie the head to the base's rows
        whole.add("lm_head")
        tensors[f"{_PREFIX}lm_head.weight"] = tensors[f"{_PREFIX}model.language_model.embed_tokens.weight"]
    _write_tensors(directory / "adapter_model.safetensors", run, tensors, source.config.decoder.num_tokens)
    names = [name for path in adapted for name, _ in by_path[path]]
    return _config(run.lora, names, sorted(whole), *base_name(base or ""))


class _Tensor(NamedTuple):
    """A tensor of the adapter.

    Attributes:
      path: the parameter, or the stored factor, that holds it.
      slot: its place among the parameters; for a factor that of its kernel.
      shape: its shape.
      dtype: its dtype.
    """

    path: str
    slot: Slot
    shape: tuple[int, ...]
    dtype: np.dtype


def _open_base(source: Source, base: str | Path | None) -> Source:
    """Opens the base model, whose parameters must have the shapes of the run's.

    Raises:
      ConvertError: there is none, transformers can't load it, or its parameters have other shapes.
    """
    where = source.weights.where
    if not base:
        raise ConvertError(f"{where}: an adapter is loaded onto a base model, and the run does not name the one it was "
                           "started from (init_from); pass it as --base")
    home = Path(local_copy(str(base)) if str(base).startswith(SCHEME) else cached_copy(str(base)) or base)
    if not (home / "config.json").is_file() or "text_config" not in read_json(home / "config.json"):
        raise ConvertError(f"{base}: can't be the base of an adapter, it is no LLaVA in transformers' layout; convert "
                           f"it (--source={base} --target=BASE --target_layout=huggingface) and pass --base=BASE")
    opened = open_source(home)
    fixed = lambda shapes: {path: shape for path, shape in shapes.items() if path not in VOCABULARY}
    check_tensors(fixed(source.weights.shapes), fixed(opened.weights.shapes), str(base))
    return opened


def _modules_unlike(
    base: Source, run: RunWeights, by_path: dict[str, list[tuple[str, Slot]]], adapted: set[str]
) -> set[str]:
    """Returns the names of the modules that an adapter holds whole: the vocabulary's, and those unlike the base's.

    Raises:
      ConvertError: kernels with factors, or the vision tower, differ: the run was not started from this base.
    """
    modules: set[str] = set()
    for path, named in by_path.items():
        if path in VOCABULARY:
            modules |= {name.rsplit(".", 1)[0] for name, _ in named}
            continue
        ours = run.stored.read(path) if path in adapted else run.read(path)
        theirs = base.weights.read(path).astype(ours.dtype)
        unlike = [name for name, slot in named if not np.array_equal(slot.of(ours), slot.of(theirs))]
        if unlike and (path in adapted or path.startswith("vision/")):
            raise ConvertError(f"{base.weights.where}: {unlike[0]} is not the one that {run.where} has, so it is not "
                               "the base of this run; pass the model that the run was started from as --base, or use "
                               "--target_layout=huggingface")
        modules |= {name.rsplit(".", 1)[0] for name in unlike}
    return modules


def _write_tensors(file: Path, run: RunWeights, tensors: dict[str, _Tensor], num_tokens: int) -> None:
    """Writes tensors with one parameter at a time in memory."""
    by_path: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_path.setdefault(tensor.path, []).append(name)
    with SafetensorsWriter(file, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
        for path, names in by_path.items():
            array = without_padding(path, (run if path in run.shapes else run.stored).read(path), num_tokens)
            for name in names:
                _, slot, _, dtype = tensors[name]
                writer.write(name, slot.transform.backward(slot.of(array)).astype(dtype, copy=False))


def _config(lora: LoraConfig, adapted: list[str], whole: list[str], base: str, revision: str | None) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`.

    Args:
      lora: rank, alpha and dropout.
      adapted: names of the kernels' tensors in the base model.
      whole: names of the modules that are saved whole.
      base: the base model's name.
      revision: its revision on the hub.
    """
    kinds = sorted({re.sub(r"^.*\.layers\.\d+\.|\.weight$", "", name) for name in adapted})
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none", "fan_in_fan_out": False,
        # A regex: the vision tower has layers of the same names.
        "target_modules": rf".*language_model\.(.*\.)?layers\.\d+\.({'|'.join(map(re.escape, kinds))})",
        "modules_to_save": whole,
    }
