"""Export of a model to a published layout or to an Orbax checkpoint. A target is written completely or not at all."""

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from vocojax.config import PAPER_VOCO
from vocojax.convert import huggingface, llava, tables
from vocojax.convert.mapping import Slot, Table
from vocojax.convert.peft import CONFIG as ADAPTER_CONFIG
from vocojax.convert.safetensors_files import SafetensorsWriter
from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import ConvertError
from vocojax.files import files_below, new_directory
from vocojax.hub import SCHEME
from vocojax.pretrained import adapter, pytorch
from vocojax.pretrained.source import Source, parameter_shapes
from vocojax.runs.card import write_card
from vocojax.runs.weights import write_parameters
from vocojax.sums import write_sums
from vocojax.weights import Shape, check_tensors

Layout = Literal["orbax", "huggingface", "llava", "peft"]
TOWER = "vision_tower"  # directory of a tower in an export to the original layout
SHARD_BYTES = 5 * 10**9
IMAGE_TOKEN = "<image>"  # transformers' processor writes it in the place of vision tokens


def export(
    source: Source,
    target: str | Path,
    layout: Layout,
    dtype: str | None = None,
    check: Callable[[Path], object] = lambda directory: None,
    base: str | Path | None = None,
) -> None:
    """Writes a model to a new directory.

    Args:
      source: what to write. One stacked parameter at a time is in memory.
      target: the directory. It appears when it is complete.
      layout: one of
        - `huggingface`: transformers' layout; a decoder alone becomes a `LlamaForCausalLM`;
        - `llava`: the original layout. A CLIP tower is in addition written to the directory `vision_tower` in the
          target (0.6 GB for CLIP-L), which `mm_vision_tower` in `config.json` names by its absolute path, since the
          original code loads towers by their names. Set the entry again after the target is moved: `config.json` of
          this layout is not in SHA256SUMS;
        - `orbax`: a training run before its first step;
        - `peft`: the LoRA adapter of a run, which PEFT loads onto a base model.
      dtype: dtype of the arrays; None keeps each array's own.
      check: called with the complete directory before it becomes the target. If it raises an error, no target is left.
      base: for the layout `peft`, the model that the run was started from, in the layout `huggingface`.

    Raises:
      ConvertError: the target exists, or the layout does not support this model.
    """
    dtypes = {path: np.dtype(dtype) if dtype else source.weights.dtype(path) for path in source.weights.shapes}
    if str(target).startswith(SCHEME):
        raise ConvertError(f"{target}: the hub is only read; write to a local directory and upload that (hf upload)")
    with new_directory(Path(target)) as directory:
        if layout == "orbax":
            _write_run(source, directory, dtypes)
        elif layout in ("huggingface", "llava", "peft"):
            _write_published(source, directory, Path(target), layout, dtypes, base, dtype)
        else:
            raise ConvertError(f"the target layout must be orbax, huggingface, llava or peft, got {layout!r}")
        check(directory)


def _write_run(source: Source, directory: Path, dtypes: Mapping[str, np.dtype]) -> None:
    write_parameters(directory, source.weights, dtypes)
    write_card(directory, source.card)


def _write_published(
    source: Source,
    directory: Path,
    target: Path,
    layout: str,
    dtypes: Mapping[str, np.dtype],
    base: str | Path | None,
    dtype: str | None,
) -> None:
    card, config, tokenizer = source.card, source.config, source.card.tokenizer
    check_tensors(parameter_shapes(config, source.decoder_only), source.weights.shapes, source.weights.where)
    for key, paper in PAPER_VOCO.items():
        found = getattr(config.voco, key)
        if found != paper and (layout == "llava" or key not in pytorch.RECIPES):
            remedy = "'huggingface' or 'orbax'" if key in pytorch.RECIPES else "'orbax'"
            raise ConvertError(f"{source.weights.where}: the layout {layout!r} has no voco.{key} {found!r}; use "
                               f"{remedy}, or train with voco.{key} {paper!r}")
    rows = config.decoder.num_tokens
    ids = _special_ids(tokenizer)
    if source.decoder_only and layout != "huggingface":
        raise ConvertError(f"{source.weights.where}: the layout {layout!r} does not support a decoder alone; use "
                           "'huggingface'")
    if source.decoder_only:
        table = tables.llama_table(config.decoder, rows)
        values = huggingface.write_decoder(config.decoder, rows, ids)
    elif layout == "llava":
        llava.require_writable(card.fit)
        table = tables.llava_table(config, rows)
        tower = ""
        if config.vision.kind == "clip":  # also one of OpenAI's config: a stage may have trained it
            _write_tower(source, directory / TOWER, dtypes)
            tower = str(target.absolute() / TOWER)
        values = llava.write_llava(config, rows, ids, card.fit, tower)
    else:
        tokenizer = copy.deepcopy(tokenizer)  # the caller's must not change
        tokenizer.huggingface.add_tokens([IMAGE_TOKEN], special_tokens=True)
        image_id = tokenizer.huggingface.get_vocab()[IMAGE_TOKEN]
        rows = max(rows, image_id + 1)
        table = tables.huggingface_table(config, rows)
        values = huggingface.write_llava(config, rows, ids, image_id) | {"auto_map": dict(pytorch.AUTO_MAP)}
        processor = huggingface.write_processor(config.vision, IMAGE_TOKEN) | pytorch.processor_entries(card)
        _write_json(directory / "processor_config.json", processor)
    if layout == "peft":
        _write_json(directory / ADAPTER_CONFIG, adapter.write_tensors(source, directory, table, base, dtype))
    else:
        _write_tensors(source, directory, table, dtypes, parameter_shapes(config, source.decoder_only))
    tokenizer.save(directory)
    if layout != "llava" and not source.decoder_only:
        pytorch.name_fast_tokenizer(directory)
        pytorch.write_sources(directory, card, adapter.base_name(base) if layout == "peft" and base else None, rows)
    if not source.decoder_only:
        values["vocojax"] = pytorch.model_entry(card)
        _write_json(directory / "preprocessor_config.json", huggingface.write_image_processor(config.vision, card.fit))
    _write_json(directory / "generation_config.json", ids)
    most = max(dtypes.values(), key=list(dtypes.values()).count)
    _write_json(directory / "config.json",
                {**values, "torch_dtype": most.name, **card.published()})
    edited = ("config.json",) if layout == "llava" else ()  # its `mm_vision_tower`, when the directory is moved
    write_sums(directory, (name for name in files_below(directory) if name not in edited))


def _write_tower(source: Source, directory: Path, dtypes: Mapping[str, np.dtype]) -> None:
    """Writes the vision tower as a directory that transformers' `CLIPVisionModel` and `CLIPImageProcessor` load."""
    config = source.config.vision
    shapes = {path: shape for path, shape in parameter_shapes(source.config).items() if path.startswith("vision/")}
    directory.mkdir()
    _write_tensors(source, directory, tables.tower_table(config), dtypes, shapes)
    dtype = dtypes["vision/class_embedding"].name
    _write_json(directory / "config.json",
                {**huggingface.write_vision(config), "architectures": ["CLIPVisionModel"], "torch_dtype": dtype})
    _write_json(directory / "preprocessor_config.json", huggingface.write_image_processor(config, source.card.fit))


def _write_tensors(
    source: Source, directory: Path, table: Table, dtypes: Mapping[str, np.dtype], shapes: Mapping[str, Shape]
) -> None:
    """Writes the shards and their index, parameter by parameter; each tensor goes to its place in its shard."""
    weights = source.weights
    slots = table.resolve(shapes)
    shards = _assign_shards(slots, dtypes)
    if len(shards) > 1:
        homes = {name: shard for shard, names in shards.items() for name in names}
        total = sum(_bytes(slots[name], dtypes) for name in slots)
        _write_json(directory / "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": homes})
    by_path: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in slots.items():
        by_path.setdefault(slot.path, []).append((name, slot))
    with contextlib.ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        for shard, names in shards.items():
            announced = {name: (dtypes[slots[name].path], slots[name].shape) for name in names}
            writer = stack.enter_context(SafetensorsWriter(directory / shard, announced))
            writers |= dict.fromkeys(names, writer)
        for path, tensors in by_path.items():
            parameter = weights.read(path)
            parameter = tables.without_padding(path, parameter, source.config.decoder.num_tokens)
            for name, slot in tensors:
                writers[name].write(name, slot.transform.backward(slot.of(parameter)).astype(dtypes[path], copy=False))
            del parameter  # frees the memory before the next one is read


def _assign_shards(slots: Mapping[str, Slot], dtypes: Mapping[str, np.dtype]) -> dict[str, list[str]]:
    """Returns the names of the tensors in each shard.

    The tensors of a layer are consecutive. A shard has at most `SHARD_BYTES`; a larger tensor has a shard of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(slots, key=lambda name: (slots[name].layer is not None, slots[name].layer or 0)):
        bytes_ = _bytes(slots[name], dtypes)
        if groups[-1] and size + bytes_ > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)}


def _bytes(slot: Slot, dtypes: Mapping[str, np.dtype]) -> int:
    return int(np.prod(slot.shape, dtype=np.int64)) * dtypes[slot.path].itemsize


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.huggingface.pad_token_id}


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
