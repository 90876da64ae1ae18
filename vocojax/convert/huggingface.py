"""Readers and writers of the config files of transformers' classes.

Covered are `LlamaForCausalLM`, `CLIPVisionModel`, `LlavaForConditionalGeneration` and the image processor. A file that
asks for something vocojax does not compute is refused: another activation, biases in the decoder, another kind of
rotary scaling.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vocojax.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    RopeScalingConfig,
    VisionConfig,
    VocoConfig,
    build,
)
from vocojax.convert.entries import ROPE, check_entries
from vocojax.data.images import Fit
from vocojax.errors import ConvertError
from vocojax.files import parse_json
from vocojax.models.clip import CLIP_MEAN, CLIP_STD

T = TypeVar("T")
Json = dict[str, Any]
_JSON_TYPES = {int: "integer", float: "number", dict: "object", str: "string"}

# transformers' defaults of keys that a config file leaves out.
_LLAMA_DEFAULTS: Json = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}
_CLIP_DEFAULTS: Json = {
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "layer_norm_eps": 1e-5,
}
_EVA_TYPE = "eva_vision_model"  # transformers has no such class; only vocojax's exports use the name
# transformers' names of our keys, where they differ.
_THEIR_KEYS = {
    "width": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_width": "head_dim", "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "max_positions": "max_position_embeddings",
}


def read_json(path: str | Path) -> Json:
    """Reads the object in a JSON file.

    Raises:
      ConvertError: the file does not exist or does not hold a JSON object.
    """
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file; check the path of the directory") from None
    except ValueError as error:
        raise ConvertError(f"{path}: not JSON: {error}; download the file again") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: must hold a JSON object; download the file again")
    return values


def checked(where: str, make: Callable[[], T]) -> T:
    """Returns the result of `make`.

    Args:
      where: the config file, for the error.
      make: builds a config.

    Raises:
      ConvertError: `make` raised a `ConfigError`; the message names the file and its key.
    """
    try:
        return make()
    except ConfigError as error:
        raise ConvertError(f"{where}: {_THEIR_KEYS.get(error.key, error.key)} {error.problem}") from None


def typed(values: Mapping[str, Any], key: str, kind: type[T], default: T, where: str) -> T:
    """Returns an entry of a config file, or the default if it is absent or null.

    Args:
      values: the file's content.
      key: the entry.
      kind: type of the entry: int, float (which also takes an int), dict or str.
      default: used if there is no entry.
      where: the file, for the error.

    Raises:
      ConvertError: the entry has another type.
    """
    value = values.get(key)
    if value is None:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConvertError(f"{where}: {key} must be of type {_JSON_TYPES[kind]}, got {values[key]!r}")
    return value


def read_decoder(values: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads a `LlamaConfig`.

    Args:
      values: the file's content.
      where: the file, for errors.

    Returns:
      The decoder's config. `vocab_size` is the tensors' number of rows, without a row for `<voco>` or padding.

    Raises:
      ConvertError: a value is invalid or not supported.
    """
    check_entries(values, "decoder", where)
    values = {**_LLAMA_DEFAULTS, **{key: value for key, value in values.items() if value is not None}}
    width, heads = (typed(values, key, int, 0, where) for key in ("hidden_size", "num_attention_heads"))
    if "head_dim" not in values and (heads < 1 or width % heads):
        raise ConvertError(f"{where}: num_attention_heads {heads} must divide hidden_size {width}")
    theta, scaling = _read_rope(values, where)
    return checked(where, lambda: build(DecoderConfig, {
        "vocab_size": values["vocab_size"], "width": width, "depth": values["num_hidden_layers"], "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads", heads),
        "head_width": values["head_dim"] if "head_dim" in values else width // heads,
        "mlp_width": values["intermediate_size"], "rope_theta": theta, "rope_scaling": scaling,
        "norm_eps": values["rms_norm_eps"], "tie_embeddings": values["tie_word_embeddings"],
        "max_positions": values["max_position_embeddings"],
    }))


Rope = tuple[float, RopeScalingConfig | None]


def _read_rope(values: Mapping[str, Any], where: str) -> Rope:
    """Reads base and scaling from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

    Raises:
      ConvertError: a value is invalid or not supported, or the two forms disagree.
    """
    theta = typed(values, "rope_theta", float, 10000.0, where)
    said = [_read_rope_form(rope, theta, f"{where}: {name}") for name in ("rope_parameters", "rope_scaling")
            if (rope := typed(values, name, dict, {}, where))]
    if len({*said}) == 2:
        raise ConvertError(f"{where}: rope_parameters says {said[0]} and rope_scaling {said[1]}; remove the wrong one")
    if said and values.get("rope_theta") is not None and said[0][0] != theta:
        raise ConvertError(f"{where}: rope_theta is {theta}, and {said[0][0]} in rope_parameters; remove the wrong one")
    return said[0] if said else (theta, None)


def _read_rope_form(rope: Mapping[str, Any], theta: float, where: str) -> Rope:
    if unknown := sorted(set(rope) - set(ROPE)):
        raise ConvertError(f"{where}.{unknown[0]} is not supported; supported are {', '.join(ROPE)}")
    check_entries(rope, "rope", where)
    theta = typed(rope, "rope_theta", float, theta, where)
    kinds = {str(rope[name]) for name in ("rope_type", "type") if rope.get(name) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds:
        raise ConvertError(f"{where}: rope_type and type differ; remove the wrong one")
    keys = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in keys:
        raise ConvertError(f"{where}: rotary scaling of type {kind!r} is not supported; supported are default, linear "
                           "and llama3")
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise ConvertError(f"{where}: factor {rope['factor']!r} has no effect with type 'default'; name the type")
        return theta, None
    scaled = {"kind": kind, **{key: rope.get(key) for key in keys[kind]}}
    if kind == "llama3":
        scaled["original_max_positions"] = rope.get("original_max_position_embeddings")
    return theta, checked(where, lambda: build(RopeScalingConfig, scaled))


def read_vision(values: Mapping[str, Any], where: str, select_layer: int = -2) -> VisionConfig:
    """Reads a vision tower's config.

    Args:
      values: a `CLIPVisionConfig`, a `CLIPConfig`, or the output of `write_vision` for an EVA tower.
      where: the file, for errors.
      select_layer: which hidden state of a CLIP tower feeds the projector.

    Raises:
      ConvertError: a value is invalid or not supported.
    """
    values = typed(values, "vision_config", dict, dict(values), where)
    is_eva = values.get("model_type") == _EVA_TYPE
    check_entries(values, "eva" if is_eva else "vision", where)
    values = {**_CLIP_DEFAULTS, **values}
    return checked(where, lambda: build(VisionConfig, {
        "kind": "eva" if is_eva else "clip", "image_size": values["image_size"], "patch_size": values["patch_size"],
        "width": values["hidden_size"],
        "depth": values["num_hidden_layers"], "num_heads": values["num_attention_heads"],
        "mlp_width": values["intermediate_size"], "select_layer": -1 if is_eva else select_layer,
        "norm_eps": values["layer_norm_eps"],
    }))


def read_llava(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads a `LlavaConfig`.

    Args:
      values: the file's content.
      where: the file, for errors.

    Returns:
      The model's config, with the tensors' vocabulary. For `voco` see `read_voco`.

    Raises:
      ConvertError: a value is invalid or not supported.
    """
    check_entries(values, "huggingface", where)
    select_layer = values.get("vision_feature_layer", -2)
    if not isinstance(select_layer, int):
        raise ConvertError(f"{where}: vision_feature_layer must be one layer, got {select_layer!r}")
    for part, known in (("text_config", ("llama",)), ("vision_config", ("clip_vision_model", _EVA_TYPE))):
        kind = typed(values, part, dict, {}, where).get("model_type", known[0])
        if kind not in known:
            raise ConvertError(f"{where}: {part}.model_type {kind!r} is not supported; supported: {', '.join(known)}")
    text = typed(values, "text_config", dict, {}, where)
    decoder = read_decoder({"tie_word_embeddings": values.get("tie_word_embeddings"), **text}, where)
    vision = read_vision(typed(values, "vision_config", dict, {}, where), where, select_layer)
    return checked(where, lambda: ModelConfig(vision, ProjectorConfig("mlp2x_gelu"), decoder, read_voco(values, where)))


def read_voco(values: Mapping[str, Any], where: str) -> VocoConfig:
    """Reads the `voco` entry that vocojax's exports write. Without it `token_id` is 0, which the caller replaces."""
    return checked(where, lambda: build(VocoConfig, typed(values, "voco", dict, {"token_id": 0}, where)))


def write_decoder(config: DecoderConfig, rows: int, ids: Mapping[str, int | None]) -> Json:
    """Returns a `LlamaConfig`.

    Args:
      config: the decoder.
      rows: rows of the vocabulary in the tensors.
      ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """
    values: Json = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "hidden_size": config.width,
        "intermediate_size": config.mlp_width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions, **ids,
    }
    scaling = config.rope_scaling
    if scaling is not None:
        values["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        values["rope_scaling"] |= {
            "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return values


def write_vision(config: VisionConfig) -> Json:
    """Returns a `CLIPVisionConfig`; an EVA tower has the same keys and another `model_type`."""
    return {
        "model_type": "clip_vision_model" if config.kind == "clip" else _EVA_TYPE,
        "image_size": config.image_size, "patch_size": config.patch_size, "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width, "layer_norm_eps": config.norm_eps,
        "hidden_act": "quick_gelu" if config.kind == "clip" else "gelu", "num_channels": 3, "projection_dim": 768,
    }


def write_llava(config: ModelConfig, rows: int, ids: Mapping[str, int | None], image_id: int) -> Json:
    """Returns a `LlavaConfig`.

    Args:
      config: the model.
      rows: rows of the vocabulary in the tensors.
      ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.
      image_id: the id of `<image>`.
    """
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": write_decoder(config.decoder, rows, ids), "vision_config": write_vision(config.vision),
        "image_token_index": image_id, "image_seq_length": config.vision.num_patches, "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True, "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": config.decoder.tie_embeddings, **ids,
    }


def check_image_processor(directory: Path) -> None:
    """Checks the settings of a directory's image processor, if it has one: pixels must be those of CLIP.

    Raises:
      ConvertError: a setting is not supported, such as another mean.
    """
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (path := directory / name).is_file():
            values = read_json(path)
            values = values if part is None else typed(values, part, dict, {}, str(path))
            check_entries(values, "image_processor", str(path))


def write_image_processor(config: VisionConfig, fit: Fit) -> Json:
    """Returns a `CLIPImageProcessor` with CLIP's mean and deviation.

    Args:
      config: the tower.
      fit: how images become square. With `square` they are stretched; with `crop` the shortest side becomes the
        tower's and the middle is cropped, which leaves images alone that are square already (the other fits).
    """
    side = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": side if fit == "square" else {"shortest_edge": config.image_size}, "resample": 3,
        "do_center_crop": fit != "square", "crop_size": side, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
    }


def write_processor(config: VisionConfig, image_token: str) -> Json:
    """Returns what `LlavaProcessor` needs in addition to the tokenizer and the image processor."""
    return {
        "processor_class": "LlavaProcessor", "patch_size": config.patch_size, "image_token": image_token,
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }
