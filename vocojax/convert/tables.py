"""Tables of the published layouts: which tensor holds which parameter."""

import re

import numpy as np

from vocojax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from vocojax.convert.mapping import IDENTITY, TRANSPOSE, Rule, Table, leading_ones, patches, vocabulary
from vocojax.errors import ConvertError

# Buffers that older versions of the libraries saved with the weights.
_BUFFERS = (r".*\.rotary_emb\.inv_freq", r".*\.embeddings\.position_ids")


def _linear(name: str, path: str, layers: range | None = None, bias: bool = True) -> list[Rule]:
    weight = Rule(f"{name}.weight", f"{path}/kernel", TRANSPOSE, layers)
    return [weight, Rule(f"{name}.bias", f"{path}/bias", IDENTITY, layers)] if bias else [weight]


def _norm(name: str, path: str, layers: range | None = None) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/scale", IDENTITY, layers),
            Rule(f"{name}.bias", f"{path}/bias", IDENTITY, layers)]


def decoder_rules(
    config: DecoderConfig, model: str, head: str, *, rows: int | None = None, new_id: int | None = None
) -> list[Rule]:
    """Returns the rules of a LLaMA decoder.

    Args:
      config: the decoder.
      model: prefix of `layers.0...` in the tensors' names.
      head: name of the output projection.
      rows: rows of the vocabulary in the tensors; None: the model's without padding.
      new_id: see `vocabulary`.
    """
    rows = config.num_tokens if rows is None else rows
    grown = lambda transposed: vocabulary(rows, config.vocab_size, new_id, transposed=transposed)
    layers, block = range(config.depth), f"{model}layers.{{layer}}."
    rules = [Rule(f"{model}embed_tokens.weight", "decoder/embedding", grown(False)),
             Rule(f"{model}norm.weight", "decoder/norm/scale")]
    if not config.tie_embeddings:
        rules.append(Rule(f"{head}.weight", "decoder/head/kernel", grown(True)))
    for name, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
        rules.append(Rule(f"{block}{name}.weight", f"decoder/blocks/{ours}/scale", IDENTITY, layers))
    for name, ours in (("self_attn.q_proj", "query"), ("self_attn.k_proj", "key"), ("self_attn.v_proj", "value"),
                       ("self_attn.o_proj", "out"), ("mlp.gate_proj", "gate"), ("mlp.up_proj", "up"),
                       ("mlp.down_proj", "down")):
        rules += _linear(f"{block}{name}", f"decoder/blocks/{ours}", layers, bias=False)
    return rules


def clip_rules(config: VisionConfig, prefix: str) -> list[Rule]:
    """Returns the rules of a CLIP vision tower under `prefix`.

    Its layers are two stacks: those up to the selected hidden state, and those after it.
    """
    embeddings, block = f"{prefix}embeddings.", f"{prefix}encoder.layers.{{layer}}."
    selected = config.depth + 1 + config.select_layer
    rules = [
        Rule(f"{embeddings}class_embedding", "vision/class_embedding"),
        Rule(f"{embeddings}patch_embedding.weight", "vision/patch_embedding", patches(config.patch_size)),
        Rule(f"{embeddings}position_embedding.weight", "vision/position_embedding"),
        *_norm(f"{prefix}pre_layrnorm", "vision/pre_norm"),  # spelt so in the published files
        *_norm(f"{prefix}post_layernorm", "vision/post_norm"),
    ]
    for stack, layers in (("blocks", range(selected)), ("final_blocks", range(selected, config.depth))):
        if not layers:
            continue
        for name, ours in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
            rules += _norm(block + name, f"vision/{stack}/{ours}", layers)
        for name, ours in (("self_attn.q_proj", "attention/query"), ("self_attn.k_proj", "attention/key"),
                           ("self_attn.v_proj", "attention/value"), ("self_attn.out_proj", "attention/out"),
                           ("mlp.fc1", "mlp_in"), ("mlp.fc2", "mlp_out")):
            rules += _linear(block + name, f"vision/{stack}/{ours}", layers)
    return rules


def eva_rules(config: VisionConfig, prefix: str) -> list[Rule]:
    """Returns the rules of an EVA-CLIP vision tower under `prefix`."""
    layers, block = range(config.depth), f"{prefix}blocks.{{layer}}."
    rules = [
        Rule(f"{prefix}cls_token", "vision/class_embedding", leading_ones(2)),
        Rule(f"{prefix}pos_embed", "vision/position_embedding", leading_ones(1)),
        Rule(f"{prefix}patch_embed.proj.weight", "vision/patch_embedding/kernel", patches(config.patch_size)),
        Rule(f"{prefix}patch_embed.proj.bias", "vision/patch_embedding/bias"),
        Rule(f"{block}attn.qkv.weight", "vision/blocks/attention/qkv/kernel", TRANSPOSE, layers),
        Rule(f"{block}attn.q_bias", "vision/blocks/attention/query_bias", IDENTITY, layers),
        Rule(f"{block}attn.v_bias", "vision/blocks/attention/value_bias", IDENTITY, layers),
    ]
    for name, ours in (("norm1", "attention_norm"), ("norm2", "mlp_norm")):
        rules += _norm(block + name, f"vision/blocks/{ours}", layers)
    for name, ours in (("attn.proj", "attention/out"), ("mlp.fc1", "mlp_in"), ("mlp.fc2", "mlp_out")):
        rules += _linear(block + name, f"vision/blocks/{ours}", layers)
    return rules


def projector_rules(config: ProjectorConfig, linear_in: str, linear_out: str) -> list[Rule]:
    """Returns the rules of the projector's one or two linear layers, which have these names in the tensors."""
    rules = _linear(linear_in, "projector/linear_in")
    return rules + _linear(linear_out, "projector/linear_out") if config.kind == "mlp2x_gelu" else rules


# Names that versions 4.5x and 5 of transformers give the tensors, and the names of the published files.
HUGGINGFACE_ALIASES = (
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# The other way round: names of tensors in published files, and of these parts in the model that transformers makes.
_HUGGINGFACE_MODULES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
# Parameters with a row for each token, and the axis of these rows.
VOCABULARY = {"decoder/embedding": 0, "decoder/head/kernel": 1}


def huggingface_module_name(name: str) -> str:
    """Returns the name that a decoder's or projector's tensor has in the model that transformers (from 4.52) makes."""
    for pattern, replacement in _HUGGINGFACE_MODULES:
        name = re.sub(pattern, replacement, name)
    return name


def without_padding(path: str, parameter: np.ndarray, num_tokens: int) -> np.ndarray:
    """Returns a parameter without the padding rows of the vocabulary, which are not exported."""
    if path not in VOCABULARY:
        return parameter
    return parameter[:num_tokens] if VOCABULARY[path] == 0 else parameter[:, :num_tokens]


def huggingface_table(config: ModelConfig, rows: int, new_id: int | None = None) -> Table:
    """Returns the table of transformers' `LlavaForConditionalGeneration`.

    The rules hold the names of the published files; the aliases turn the names of later versions into these.

    Args:
      config: the model.
      rows: rows of the vocabulary in the tensors.
      new_id: see `vocabulary`.

    Raises:
      ConvertError: the layout does not support the model's vision tower, projector or compressor.
    """
    _require_no_compressor(config, "huggingface")
    if config.vision.kind != "clip" or config.projector.kind != "mlp2x_gelu":
        raise ConvertError(f"the layout 'huggingface' does not support a vision tower of kind {config.vision.kind!r} "
                           f"with a projector of kind {config.projector.kind!r}; use the layout 'llava'")
    rules = [
        *decoder_rules(config.decoder, "language_model.model.", "language_model.lm_head", rows=rows, new_id=new_id),
        *clip_rules(config.vision, "vision_tower.vision_model."),
        *projector_rules(config.projector, "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ]
    if config.voco_offsets:  # transformers' own class has no such tensor: the export's PyTorch code reads it
        rules.append(Rule("voco_offsets.weight", "decoder/voco_offsets"))
    return Table("huggingface", tuple(rules), _unused(config.decoder, r"language_model\.lm_head"),
                 HUGGINGFACE_ALIASES)


def tower_table(config: VisionConfig) -> Table:
    """Returns the table of transformers' `CLIPVisionModel`, a CLIP vision tower alone."""
    return Table("clip", tuple(clip_rules(config, "vision_model.")))


TOWER = "model.vision_tower.vision_tower."  # prefix of the vision tower's own names in the original layout


def llava_table(config: ModelConfig, rows: int, new_id: int | None = None) -> Table:
    """Returns the table of the original `llava_llama` layout.

    LLaVA-1.5, the released VoCo-LLaMA, Shikra (linear projector) and LLaMA-VID (EVA tower) use it.

    Args:
      config: the model.
      rows: rows of the vocabulary in the tensors.
      new_id: see `vocabulary`.

    Raises:
      ConvertError: the model has a compressor.
    """
    _require_no_compressor(config, "llava")
    is_clip, is_linear = config.vision.kind == "clip", config.projector.kind == "linear"
    projector = "model.mm_projector" if is_linear else "model.mm_projector.0"
    rules = [
        *decoder_rules(config.decoder, "model.", "lm_head", rows=rows, new_id=new_id),
        *(clip_rules(config.vision, f"{TOWER}vision_model.") if is_clip else eva_rules(config.vision, TOWER)),
        *projector_rules(config.projector, projector, "model.mm_projector.2"),
    ]
    aliases = (
        (r"^mm_projector\.", "model.mm_projector."),
        (rf"^{re.escape(TOWER)}(embeddings|encoder|pre_layrnorm|post_layernorm)\.", rf"{TOWER}vision_model.\1."),
    )
    tower = re.escape(TOWER)
    unused = (
        (rf"{tower}(text_model\..*|visual_projection\..*|text_projection\..*|logit_scale)",) if is_clip
        # BLIP-2 and LLaMA-VID run all but the last of the published blocks, and nothing after them.
        else (rf"{tower}blocks\.{config.vision.depth}\..*", rf"{tower}(norm|fc_norm|head|lm_head)\..*",
              rf"{tower}mask_token")
    )
    return Table("llava", tuple(rules), _unused(config.decoder, "lm_head") + unused, aliases)


def llama_table(config: DecoderConfig, rows: int, new_id: int | None = None) -> Table:
    """Returns the table of transformers' `LlamaForCausalLM`, a decoder alone.

    Args:
      config: the decoder.
      rows: rows of the vocabulary in the tensors.
      new_id: see `vocabulary`.
    """
    rules = decoder_rules(config, "model.", "lm_head", rows=rows, new_id=new_id)
    return Table("llama", tuple(rules), _unused(config, "lm_head"))


def _unused(config: DecoderConfig, head: str) -> tuple[str, ...]:
    """Returns regexes of tensors to ignore: buffers, and with tied embeddings the head, which is a copy of them."""
    return (*_BUFFERS, rf"{head}\.weight") if config.tie_embeddings else _BUFFERS


def _require_no_compressor(config: ModelConfig, layout: str) -> None:
    if config.compressor.kind != "none":
        raise ConvertError(f"the layout {layout!r} does not support the compressor {config.compressor.kind!r} of a "
                           "baseline; use the layout 'orbax'")
