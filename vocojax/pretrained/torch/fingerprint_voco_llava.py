"""The fingerprint of a model, as vocojax computes it: caches are exchanged between models with the same one.

It is a digest of the names, dtypes, shapes and values of all parameters in vocojax's layout: kernels are [in, out], and
the layers of a stack are one array. Each entry's bits are hashed with its place, and the hashes are summed, so that the
tensors are read one by one where they lie.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

_WORDS = 4  # 32-bit words of a parameter's checksum
_CHUNK = 2**24  # entries that are hashed at once
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Fingerprint(NamedTuple):
    """Identity of a model: two models with the same fingerprint can read each other's caches.

    Attributes:
      config: the model's config without the number of VoCo tokens, its dtype, and the ids of a unit, as JSON.
      parameters: digest of all parameters.
    """

    config: str
    parameters: str

    def differences(self, other: "Fingerprint") -> str:
        """Returns how `other` differs from this one, for errors: `decoder.depth is 2 there, 3 here`."""
        here, there = _flat(json.loads(self.config)), _flat(json.loads(other.config))
        odd = [f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
               for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
        return "; ".join(odd) or (f"the config is the same, but its parameters differ (digest {other.parameters[:12]} "
                                  f"there, {self.parameters[:12]} here)")


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], model: Mapping[str, Any],
                unit_ids: list[int]) -> Fingerprint:
    """Returns a model's fingerprint. It reads every parameter once.

    Args:
      tensors: names and values of the model's parameters.
      model: the model's config in vocojax.
      unit_ids: the ids of BOS and newline in a unit.

    Raises:
      ValueError: a parameter is none of the exported model's, or is quantised.
    """
    vocabulary = (model["decoder"]["vocab_size"], model["decoder"]["vocab_padding"])
    selected = model["vision"]["depth"] + 1 + model["vision"]["select_layer"]
    sums: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for name, tensor in tensors:
        path, layer, values = _parameter(name, tensor.detach(), vocabulary, selected)
        if tensor.dtype not in _BITS:
            raise ValueError(f"parameter {name} has dtype {tensor.dtype}: a quantised model has no fingerprint, so its "
                             "caches can't be saved or checked; load the model in float32 or bfloat16")
        total = _checksum(values, offset=(layer or 0) * values.numel())
        sums[path] = sums[path] + total if path in sums else total
        depth = max(shapes.get(path, [0])[0], layer + 1) if layer is not None else None
        shapes[path] = list(values.shape) if depth is None else [depth, *values.shape]
        dtypes[path] = str(tensor.dtype).removeprefix("torch.")
    text = "".join(f"{path} {dtypes[path]} {shapes[path]} {(sums[path] % 2**32).tolist()}\n" for path in sorted(sums))
    # These are left out, as vocojax leaves them out: an exported model has no compressor that reads text.
    default = {"positions": "compact", "rows": "shared", "places": "end", "sees": "unit", "reads": "input"}
    if model["voco"].get("init", "learned") == "learned":  # else the number of VoCo tokens decides their windows
        default |= {"num_vocos": model["voco"]["num_vocos"], "init": "learned"}
    of_text = ("num_queries", "question_tokens")
    config = {**model, "voco": {key: value for key, value in model["voco"].items() if value != default.get(key)},
              "compressor": {key: value for key, value in model["compressor"].items() if key not in of_text},
              "dtype": dtypes["decoder/embedding"], "unit_ids": unit_ids}
    return Fingerprint(json.dumps(config, sort_keys=True), hashlib.sha256(text.encode()).hexdigest())


# Names of transformers' tensors after the part that differs from version to version, and vocojax's parameters.
_DECODER_LAYER = {
    "input_layernorm.weight": "attention_norm/scale", "post_attention_layernorm.weight": "mlp_norm/scale",
    "self_attn.q_proj.weight": "query/kernel", "self_attn.k_proj.weight": "key/kernel",
    "self_attn.v_proj.weight": "value/kernel", "self_attn.o_proj.weight": "out/kernel",
    "mlp.gate_proj.weight": "gate/kernel", "mlp.up_proj.weight": "up/kernel", "mlp.down_proj.weight": "down/kernel",
}
_VISION_LAYER = {
    "layer_norm1": "attention_norm", "layer_norm2": "mlp_norm", "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key", "self_attn.v_proj": "attention/value", "self_attn.out_proj": "attention/out",
    "mlp.fc1": "mlp_in", "mlp.fc2": "mlp_out",
}
_SINGLE = {
    "embed_tokens.weight": "decoder/embedding", "norm.weight": "decoder/norm/scale",
    "lm_head.weight": "decoder/head/kernel", "embeddings.class_embedding": "vision/class_embedding",
    "embeddings.patch_embedding.weight": "vision/patch_embedding",
    "embeddings.position_embedding.weight": "vision/position_embedding",
    "pre_layrnorm.weight": "vision/pre_norm/scale", "pre_layrnorm.bias": "vision/pre_norm/bias",
    "post_layernorm.weight": "vision/post_norm/scale", "post_layernorm.bias": "vision/post_norm/bias",
    "linear_1.weight": "projector/linear_in/kernel", "linear_1.bias": "projector/linear_in/bias",
    "linear_2.weight": "projector/linear_out/kernel", "linear_2.bias": "projector/linear_out/bias",
    "voco_offsets.weight": "decoder/voco_offsets",
}
_PREFIX = re.compile(r"(model\.)?((language_model|vision_tower|multi_modal_projector)\.)?(model\.|vision_model\.)?")
_LAYER = re.compile(r"(encoder\.)?layers\.(\d+)\.(.*)")


def _parameter(
    name: str, tensor: torch.Tensor, vocabulary: tuple[int, int], selected: int
) -> tuple[str, int | None, torch.Tensor]:
    """Returns the parameter that a tensor holds, the layer of it (or None), and the values in vocojax's layout."""
    short = _PREFIX.sub("", name, count=1)
    layer = None
    if match := _LAYER.fullmatch(short):
        layer = int(match[2])
        path = _vision_layer(match[3]) if match[1] else _DECODER_LAYER.get(match[3])
        if match[1] and path is not None:
            stack, layer = ("blocks", layer) if layer < selected else ("final_blocks", layer - selected)
            path = f"vision/{stack}/{path}"
        elif path is not None:
            path = f"decoder/blocks/{path}"
    else:
        path = _SINGLE.get(short)
    if path is None:
        raise ValueError(f"parameter {name} is none of an exported VoCo-LLaMA's, so the model has no fingerprint: "
                         "merge adapters into the weights first")
    if path in ("decoder/embedding", "decoder/head/kernel"):
        size, padding = vocabulary
        tensor = torch.nn.functional.pad(tensor[: size - padding], (0, 0, 0, padding))
    if path == "vision/patch_embedding":
        return path, layer, tensor.permute(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return path, layer, tensor.T if path.endswith("kernel") else tensor


def _vision_layer(name: str) -> str | None:
    """Returns the path of a tensor in a layer of the vision tower, without the stack."""
    part, _, kind = name.rpartition(".")
    if part not in _VISION_LAYER:
        return None
    weight = "scale" if "norm" in part else "kernel"
    return f"{_VISION_LAYER[part]}/{weight if kind == 'weight' else kind}"


def _checksum(x: torch.Tensor, offset: int) -> torch.Tensor:
    """Returns int64 [_WORDS]: sums over all entries of a hash of their bits and of their place, modulo 2**32.

    Args:
      x: a parameter, or one layer of it.
      offset: place of its first entry in the parameter.
    """
    rows = max(1, _CHUNK // max(1, math.prod(x.shape[1:])))
    total = torch.zeros(_WORDS, dtype=torch.int64, device=x.device)
    for part in x.split(rows):
        bits = part.contiguous().view(_BITS[x.dtype]).flatten().to(torch.int32)
        if part.element_size() == 2:
            bits = bits & 0xFFFF
        place = torch.arange(offset, offset + part.numel(), device=x.device).to(torch.int32)  # modulo 2**32
        mixed = _mix(bits ^ _mix(place + _signed(0x9E3779B9)))
        words = [_mix(mixed + _signed(0x85EBCA6B * word)).sum(dtype=torch.int64) for word in range(1, _WORDS + 1)]
        total += torch.stack(words)
        offset += part.numel()
    return total.cpu()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser of int32: every bit of the input changes about half of the output's."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 16)


def _shifted(x: torch.Tensor, count: int) -> torch.Tensor:
    """Shifts right and fills with zeros; torch's own shift repeats the sign."""
    return (x >> count) & ((1 << (32 - count)) - 1)


def _signed(x: int) -> int:
    """Returns the int32 that has the bits of the low 32 bits of `x`."""
    x %= 2**32
    return x - 2**32 if x >= 2**31 else x


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
