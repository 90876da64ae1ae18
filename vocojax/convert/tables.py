"""The tables: which tensor of which published layout is which parameter."""

from vocojax.config import DecoderConfig, ProjectorConfig, VisionConfig
from vocojax.convert.mapping import (
    IDENTITY,
    TRANSPOSE,
    Rule,
    leading_ones,
    patches,
    vocabulary,
)

# Buffers that older versions of the libraries saved along with the weights.
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
    """A LLaMA decoder.

    Args:
      model: what precedes `layers.0...` in the names.
      head: the name of the output projection.
      rows, new_id: of the tensors' vocabulary, see `vocabulary`; rows default to the model's without padding.
    """
    rows = config.vocab_size - config.vocab_padding if rows is None else rows
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
    """A CLIP vision tower under `prefix`; its layers lie in two stacks, before and behind the selected one."""
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
    """An EVA-CLIP vision tower under `prefix`."""
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
    """The projector's one or two linear layers, by their names."""
    rules = _linear(linear_in, "projector/linear_in")
    return rules + _linear(linear_out, "projector/linear_out") if config.kind == "mlp2x_gelu" else rules
