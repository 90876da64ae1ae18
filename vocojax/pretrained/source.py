"""Opening of weights in any layout: what a directory holds, and which tensors hold the model's parameters."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from vocojax.config import DecoderConfig, LoraConfig, ModelConfig, VocoConfig, config_to_dict, differing_keys
from vocojax.convert import huggingface, llava, peft, tables
from vocojax.convert.entries import check_entries
from vocojax.convert.mapped import MappedWeights
from vocojax.convert.mapping import Table
from vocojax.convert.tensor_files import MergedTensors, open_directory, open_file
from vocojax.data.tokenizer import VOCO_TOKEN, Tokenizer
from vocojax.errors import ConvertError, InputError
from vocojax.hub import SCHEME, cached_copy, local_copy
from vocojax.layout import Visibility
from vocojax.models.llama import Decoder
from vocojax.models.parameters import abstract, variables_of
from vocojax.models.voco import VocoLlama
from vocojax.runs.card import ModelCard, read_card, read_published
from vocojax.runs.checkpoint_files import first_line
from vocojax.runs.directory import is_run, run_path
from vocojax.runs.weights import RunWeights
from vocojax.sums import require_small_files
from vocojax.weights import Shape, Weights, check_tensors

# Vocabularies are padded to a multiple of this, so that tensor-parallel devices share them evenly. libtpu also needs
# it to reduce-scatter the head's gradient: it uses an all-reduce if a row is not a multiple of two registers of 128.
VOCAB_MULTIPLE = 256
# Values of `model_type` that are read. Other architectures have LLaMA's tensor names too; only this entry differs.
MODEL_TYPES = ("llama", "llava", "llava_llama", "shikra")
# The released code writes no such number: it trains with two VoCo tokens only.
_RELEASED_VOCOS = 2


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
      card: everything about the model except its weights.
      weights: the parameters by path. LoRA factors are merged.
    """

    card: ModelCard
    weights: Weights

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.card.model

    @property
    def decoder_only(self) -> bool:
        """True if the model is a decoder without vision tower and projector."""
        return is_decoder_only(self.weights)


def is_decoder_only(weights: Weights) -> bool:
    """Returns whether these are the weights of a decoder without vision tower and projector."""
    return all(path.startswith("decoder/") for path in weights.shapes)


@functools.cache
def parameter_shapes(config: ModelConfig, decoder_only: bool = False) -> Mapping[str, Shape]:
    """Returns the shapes of a model's parameters by path: of all of them, or only of the decoder's."""
    if not decoder_only:
        variables = variables_of(abstract(lambda: VocoLlama(config, nnx.Rngs(0))))
        return {path: tuple(variable.shape) for path, variable in variables.items()}
    variables = variables_of(abstract(lambda: Decoder(config.decoder, nnx.Rngs(0))))
    return {f"decoder/{path}": tuple(variable.shape) for path, variable in variables.items()}


def open_source(
    directory: str | Path,
    *,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    tokenizer: str | Path | None = None,
    num_vocos: int | None = None,
    allow_missing: Collection[str] = (),
    base: str | Path | None = None,
) -> Source:
    """Opens weights. Only their headers are read.

    Args:
      directory: on this machine or on the hub (`hf://org/name[@revision]`, also for the other paths), one of
        - a `LlavaForConditionalGeneration` of transformers (tensor names of versions 4 and 5);
        - the original layout: LLaVA-1.5, the released VoCo-LLaMA, Shikra, LLaMA-VID;
        - a `LlamaForCausalLM` (LLaMA, Vicuna, ...): part of a model if `vision` is given, else a decoder alone;
        - a LoRA adapter in PEFT's layout, also with LLaVA's `non_lora_trainables.bin`: it is merged into its base;
        - a training run, or a conversion's target in the layout `orbax`: the newest Orbax checkpoint is read.
      vision: directory of a CLIP vision tower or file of an EVA-CLIP one, if the directory has none.
      projector: file of a projector, if the directory has none.
      tokenizer: directory of the tokenizer, if the directory has none.
      num_vocos: VoCo tokens per unit, if the directory does not say it; by default 2 for a checkpoint of the released
        VoCo-LLaMA (an original layout whose vocabulary has `<voco>`), and 1 otherwise.
      allow_missing: regexes of tensors that may be missing or unexpected.
      base: directory of an adapter's base model, if it is not where `adapter_config.json` says.

    Raises:
      ConvertError: a file is missing or damaged, or the model is not supported; the message names the file, the tensors
        and the remedy.
      CheckpointError: a run has no complete checkpoint, or it is damaged.
    """
    directory = local_copy(directory)
    vision, projector, tokenizer = (local_copy(part) if part else None for part in (vision, projector, tokenizer))
    if not run_path(directory).is_dir():
        raise ConvertError(f"{directory}: no such directory; check the path")
    if is_run(directory):
        _refuse_parts(directory, vision, projector)
        return _open_run(directory, tokenizer, num_vocos, allow_missing)
    directory = Path(directory)
    require_small_files(directory)
    home = _base_of(directory, base) if peft.is_adapter(directory) else directory
    if base is not None and home == directory:
        raise ConvertError(f"{directory}: is no LoRA adapter, so it has no base model; leave out --base")
    own_config = directory / "config.json"  # LLaVA's scripts write one beside the adapter, PEFT does not
    where = str(own_config if own_config.is_file() else home / "config.json")
    values = huggingface.read_json(Path(where))
    if values.get("model_type", "llama") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConvertError(f"{where}: model_type {values['model_type']!r} is not supported; supported are {known}")
    huggingface.check_image_processor(directory)
    tensors = open_directory(home)
    if home != directory:
        tensors = peft.AdaptedTensors(tensors, directory)
    make_table: Callable[[ModelConfig, int, int | None], Table]
    if "text_config" in values:
        _refuse_parts(directory, vision, projector)
        config, make_table = huggingface.read_llava(values, where), tables.huggingface_table
    elif "mm_hidden_size" in values or vision or projector:
        tensors = _with_parts(tensors, vision, projector)
        config, make_table = _read_original(values, tensors, vision, where), tables.llava_table
    else:
        decoder = huggingface.read_decoder(values, where)
        config = ModelConfig(decoder=decoder, voco=huggingface.read_voco(values, where))
        make_table = _llama_table
    own_tokenizer = _read_tokenizer(Path(tokenizer or (directory if _has_tokenizer(directory) else home)))
    rows, voco_id = config.decoder.vocab_size, own_tokenizer.voco_id
    if "voco" in values:
        _require_same_voco(config.voco, own_tokenizer, num_vocos, where)
    # The last row of the released code's vocabulary is `<voco>`'s, even if its tokenizer does not know the token.
    knows_voco = own_tokenizer.had_voco or ("mm_hidden_size" in values and rows == voco_id + 1)
    is_released = knows_voco and "mm_hidden_size" in values and "voco" not in values
    config = replace(
        config, decoder=_own_vocabulary(config.decoder, values, where) or _grown(config.decoder, voco_id),
        voco=replace(config.voco, num_vocos=num_vocos or (_RELEASED_VOCOS if is_released else config.voco.num_vocos),
                     token_id=voco_id),
    )
    _require_own_config(config, values, where)
    table = make_table(config, rows, None if knows_voco and voco_id < rows else voco_id)
    shapes = parameter_shapes(config, decoder_only=make_table is _llama_table)
    # A model without `<voco>` in its vocabulary was never trained to compress: it is a plain LLaVA.
    trained_with: Visibility = "voco" if knows_voco or "voco" in values else "causal"
    said = huggingface.checked(where, lambda: read_published(
        values, llava.read_fit(values, where), trained_with, "released" if is_released else "vicuna_v1"))
    card = ModelCard(model=config, tokenizer=own_tokenizer, **said)
    return Source(card, MappedWeights(table, tensors, shapes, allow_missing))


def _base_of(adapter: Path, base: str | Path | None) -> Path:
    """Returns the directory of an adapter's base model.

    Raises:
      ConvertError: it is not here, or is no published model.
    """
    name, revision = (str(base), None) if base else peft.base_name(adapter)
    home = local_copy(name) if name.startswith(SCHEME) else cached_copy(name, revision) or name
    if not name or not Path(home).is_dir():
        raise ConvertError(f"{adapter}: is a LoRA adapter, and its base model {name!r} is not here; download it "
                           "and pass its directory as --base")
    if is_run(home) or peft.is_adapter(Path(home)):
        raise ConvertError(f"{adapter}: is a LoRA adapter, and its base {name!r} is a training run or an "
                           "adapter; convert that to the layout huggingface first, and pass the result as --base")
    require_small_files(Path(home))
    return Path(home)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"))


def _refuse_parts(directory: str | Path, *parts: str | Path | None) -> None:
    if any(parts):
        raise ConvertError(f"{directory}: already has a vision tower and a projector; leave out --vision and "
                           "--projector")


def _llama_table(config: ModelConfig, rows: int, new_id: int | None) -> Table:
    return tables.llama_table(config.decoder, rows, new_id)


def _grown(config: DecoderConfig, voco_id: int) -> DecoderConfig:
    """Returns the decoder's config with a row for `<voco>` and a vocabulary that can be sharded."""
    tokens = max(config.vocab_size, voco_id + 1)
    size = -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return replace(config, vocab_size=size, vocab_padding=size - tokens)


def _require_own_config(config: ModelConfig, values: Mapping[str, Any], where: str) -> None:
    """Compares the entries that were read with the copy of the whole config that an export has; others have none.

    Raises:
      ConvertError: they differ.
    """
    own = values.get("vocojax")
    if own is not None and (keys := differing_keys(config_to_dict(config), own.get("model", {}))):
        raise ConvertError(f"{where}: was changed after it was written: {', '.join(keys)} differ from its entry "
                           "'vocojax'; export the model again, or delete that entry if the change is meant")


def _own_vocabulary(config: DecoderConfig, values: Mapping[str, Any], where: str) -> DecoderConfig | None:
    """Returns the decoder's config with the vocabulary that an export had before, or None for other directories.

    An export then has the fingerprint of its run, and both read the same caches.
    """
    own = values.get("vocojax")
    if own is None:
        return None
    try:
        size, padding = (own["model"]["decoder"][key] for key in ("vocab_size", "vocab_padding"))
        return replace(config, vocab_size=size, vocab_padding=padding)
    except (KeyError, TypeError) as error:
        raise ConvertError(f"{where}: the entry 'vocojax' has no vocabulary ({first_line(error)}); export the model "
                           "again, or delete the entry") from None


def _read_tokenizer(directory: Path) -> Tokenizer:
    try:
        return Tokenizer.from_directory(directory)
    except (OSError, InputError) as error:
        raise ConvertError(f"{directory}: no usable tokenizer ({first_line(error)}); pass a directory that has one as "
                           "--tokenizer") from None


def _with_parts(tensors: Weights, vision: str | Path | None, projector: str | Path | None) -> Weights:
    """Adds separate parts to the tensors of a decoder or of a model; all have the original layout's names."""
    parts: list[tuple[Weights, Callable[[str], str]]] = [(tensors, lambda name: name)]
    if vision is not None:
        tower = open_directory(vision) if Path(vision).is_dir() else open_file(vision)
        parts.append((tower, lambda name: tables.TOWER + name))
    if projector is not None:
        parts.append((open_file(projector), peft.plain_name))
    if len(parts) == 1:
        return tensors
    return MergedTensors(" + ".join(part.where for part, _ in parts), parts)


def _read_original(values: huggingface.Json, tensors: Weights, vision: str | Path | None, where: str) -> ModelConfig:
    check_entries(values, "original", where)
    if separate := _tower_directory(vision, tensors):
        huggingface.check_image_processor(separate)
        path = separate / "config.json"
        tower = huggingface.read_vision(huggingface.read_json(path), str(path),
                                        huggingface.typed(values, "mm_vision_select_layer", int, -2, where))
    else:
        tower = llava.vision_of_tensors(values, tensors.shapes, where)
        if home := llava.tower_directory(values, where):
            huggingface.check_image_processor(home)
    return llava.read_llava(values, tower, llava.read_projector(values, tensors.shapes, where), where)


def _tower_directory(vision: str | Path | None, tensors: Weights) -> Path | None:
    """Returns the directory with a separate tower's config, or None: EVA-CLIP's file has none."""
    if vision is None:
        return None
    if Path(vision).is_dir():
        return Path(vision)
    config = Path(vision).with_name("config.json")
    if f"{tables.TOWER}cls_token" in tensors.shapes or not config.is_file():
        return None
    is_clip = huggingface.read_json(config).get("model_type") in ("clip", "clip_vision_model")
    return config.parent if is_clip else None


def _open_run(
    directory: str | Path, tokenizer: str | Path | None, num_vocos: int | None, allow_missing: Collection[str]
) -> Source:
    card = read_card(directory, tokenizer)
    weights = RunWeights(directory, card.lora)
    allowed = [re.compile(pattern) for pattern in allow_missing]
    check_tensors(parameter_shapes(card.model, is_decoder_only(weights)), weights.shapes, weights.where, allowed)
    _require_same_voco(card.model.voco, card.tokenizer, num_vocos, f"{directory}/config.json")
    return Source(replace(card, lora=LoraConfig()), weights)


def _require_same_voco(voco: VocoConfig, tokenizer: Tokenizer, num_vocos: int | None, where: str) -> None:
    if voco.token_id != tokenizer.voco_id:
        raise ConvertError(f"{where}: {VOCO_TOKEN} is token {voco.token_id} here and token {tokenizer.voco_id} in the "
                           "tokenizer; pass the tokenizer that belongs to these weights as --tokenizer")
    if num_vocos not in (None, voco.num_vocos):
        raise ConvertError(f"{where}: the model has {voco.num_vocos} VoCo tokens per unit, not {num_vocos}; leave out "
                           "--num_vocos")
