"""Tables of all entries of foreign config files: what vocojax does with each of them.

An entry is honoured, supported with some values only, or irrelevant to what the model computes. Any other value is
refused by name, and an entry that no table knows is reported. `python -m vocojax.convert.entries` writes the page
docs/convert_entries.md from these tables.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vocojax.data.tokenizer import foreign_code
from vocojax.errors import ConvertError
from vocojax.models.clip import CLIP_MEAN, CLIP_STD

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What is done with an entry.

    Attributes:
      use: one of `honoured`, `limited` (some values only) and `irrelevant`.
      note: what the entry means, or why it is irrelevant.
      values: of a limited entry, the values that are supported.
    """

    use: str
    note: str
    values: tuple[Any, ...] = ()


Table = Mapping[str, Entry]


def _honoured(**notes: str) -> dict[str, Entry]:
    return {name: Entry("honoured", note) for name, note in notes.items()}


def _limited(note: str, **values: Iterable[Any]) -> dict[str, Entry]:
    return {name: Entry("limited", note, tuple(allowed)) for name, allowed in values.items()}


def _irrelevant(note: str, names: str) -> dict[str, Entry]:
    return {name: Entry("irrelevant", note) for name in names.split()}


# Entries that transformers writes into the config of any model.
_ANY_MODEL: Table = {
    **_irrelevant("says who wrote the file", """
        _name_or_path _commit_hash architectures transformers_version finetuning_task task_specific_params name_or_path
        _diffusers_version vocojax_version license"""),
    **_irrelevant("says how PyTorch runs the model; the function is the same", """
        torch_dtype dtype torchscript use_bfloat16 use_cache output_attentions output_hidden_states return_dict
        chunk_size_feed_forward gradient_checkpointing attn_implementation _attn_implementation
        _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled use_flash_attention_2
        tf_legacy_loss pretraining_tp keys_to_ignore_at_inference output_past use_sdpa
        experts_implementation _experts_implementation"""),
    **_irrelevant("a setting of generation; requests say it here", """
        bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
        encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
        length_penalty max_length min_length max_new_tokens no_repeat_ngram_size num_beam_groups num_beams
        num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
        suppress_tokens temperature top_k top_p typical_p generation_config"""),
    **_irrelevant("belongs to classifiers", "id2label label2id num_labels problem_type"),
    **_irrelevant("a tokenizer's; its own files are read",
                  "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id tokenizer_class prefix"),
    **_irrelevant("used when parameters are drawn at random only",
                  "initializer_range initializer_factor logit_scale_init_value"),
    **_irrelevant("used in PyTorch's training only; vocojax has no dropout",
                  "attention_dropout dropout hidden_dropout resid_pdrop attn_pdrop embd_pdrop"),
    **_limited("an encoder-decoder or a model with cross-attention is another function", is_encoder_decoder=(False,),
               is_decoder=(False, True), add_cross_attention=(False,), cross_attention_hidden_size=(None,),
               tie_encoder_decoder=(False,)),
    **_limited("pruned heads change the tensors' shapes", pruned_heads=({}, None)),
    **_limited("quantized weights; convert a checkpoint that is not quantized", quantization_config=(None,)),
    **_honoured(model_type="which tables apply; see `open_source` for the types that are read",
                auto_map="Python code of the directory: never executed; refused unless vocojax wrote it"),
}
# Entries that vocojax's own exports add.
_OWN: Table = _honoured(
    voco="number, id and positions of the VoCo tokens", prompt="template, fit and mask of the model",
    vocojax="the model's own config; the vocabulary's length is read from it",
)
DECODER: Table = {
    **_ANY_MODEL, **_OWN,
    **_honoured(
        vocab_size="rows of the embedding", hidden_size="width of the hidden states",
        num_hidden_layers="number of blocks", num_attention_heads="query heads",
        num_key_value_heads="key/value heads; without it as many as query heads",
        head_dim="width of a head; without it hidden_size / num_attention_heads",
        intermediate_size="width of the MLP's hidden layer", rms_norm_eps="epsilon of the RMS norms",
        rope_theta="base of the rotary frequencies; must agree with rope_parameters",
        rope_scaling="see the table of rotary entries; must agree with rope_parameters",
        rope_parameters="see the table of rotary entries",
        tie_word_embeddings="whether the head is the transposed embedding",
        max_position_embeddings="context length; written into exports",
    ),
    **_limited("another function of the decoder", hidden_act=("silu",), attention_bias=(False,),
               mlp_bias=(False,), partial_rotary_factor=(1.0, None), rope_interleaved=(False,),
               attn_logit_softcapping=(None,), final_logit_softcapping=(None,), logit_scale=(1.0, None),
               logits_scaling=(1.0, None), embedding_multiplier=(1.0, None), residual_multiplier=(1.0, None),
               clip_qkv=(None,), qk_layernorm=(False,), use_qk_norm=(False,), no_rope_layers=(None, []),
               layer_types=(None,), num_nextn_predict_layers=(0, None)),
    **_limited("a window of attention is another mask", sliding_window=(None,), use_sliding_window=(False, None),
               max_window_layers=(None,)),
    **_irrelevant("a bound of other programs", "max_sequence_length model_max_length seq_length"),
}
ROPE: Table = {
    **_honoured(
        rope_type="`default`, `linear` or `llama3`", type="the same by its former name", rope_theta="the base",
        factor="divisor of the frequencies", low_freq_factor="of llama3", high_freq_factor="of llama3",
        original_max_position_embeddings="of llama3: context length before scaling",
    ),
    **_limited("part of a head without rotation", partial_rotary_factor=(1.0, None)),
}
VISION: Table = {
    **_ANY_MODEL,
    **_honoured(
        image_size="side of the images in pixels", patch_size="side of a patch in pixels",
        hidden_size="width of the hidden states", num_hidden_layers="number of blocks",
        num_attention_heads="attention heads", intermediate_size="width of the MLPs' hidden layer",
        layer_norm_eps="epsilon of the layer norms",
        vision_config="a CLIPConfig's part with the entries of this table",
    ),
    **_limited("another function of the tower; `gelu` is supported for EVA-CLIP only", hidden_act=("quick_gelu",)),
    **_limited("images have three channels", num_channels=(3,)),
    **_irrelevant("belongs to CLIP's text model or to its contrastive head",
                  "projection_dim text_config text_config_dict vision_config_dict vocab_size tie_word_embeddings"),
}
EVA: Table = {**VISION, **_limited("another function of the tower", hidden_act=("gelu",))}
HUGGINGFACE: Table = {
    **_ANY_MODEL, **_OWN,
    **_honoured(
        text_config="the decoder, see its table", vision_config="the vision tower, see its table",
        vision_feature_layer="hidden state of the tower that feeds the projector; one layer",
        tie_word_embeddings="used if text_config does not say it",
        image_aspect_ratio="how images become square, see the original layout",
    ),
    **_limited("the class token would be a vision token", vision_feature_select_strategy=("default",)),
    **_limited("another projector", projector_hidden_act=("gelu",), multimodal_projector_bias=(True,)),
    **_irrelevant("marks the place of vision tokens in transformers' prompts",
                  "image_token_index image_token_id image_seq_length video_token_index ignore_index"),
    **_irrelevant("said again in text_config", "vocab_size hidden_size rope_parameters rope_theta"),
    **_irrelevant("used with image_aspect_ratio `anyres` only", "image_grid_pinpoints"),
}
ORIGINAL: Table = {
    **DECODER,
    **_honoured(
        mm_vision_tower="the tower: a directory here, whose config.json is read, or a published CLIP of OpenAI",
        vision_tower="the same by its former name", vision_config="the tower's config, written by vocojax's exports",
        mm_vision_select_layer="hidden state of the tower that feeds the projector",
        mm_hidden_size="says that the directory has this layout; must be the tower's width",
        image_aspect_ratio="how images become square: `pad`, or `square` (LLaVA's word for CLIP's crop)",
    ),
    **_limited("another projector", mm_projector_type=("linear", "mlp2x_gelu"), use_mm_proj=(True, None)),
    **_limited("the class token would be a vision token", mm_vision_select_feature=("patch",)),
    **_limited("images would stand between two more tokens in every prompt", mm_use_im_start_end=(False, None)),
    **_limited("vision features of several scales", s2=(False, None), use_s2=(False, None)),
    **_limited("vision tokens would be resampled", mm_resampler_type=(None, "identity"), resampler_type=(None,),
               mm_spatial_pool_stride=(None, 1), mm_patch_merge_type=("flat", None)),
    **_limited("another tower for videos", mm_video_tower=(None,), video_tower=(None,)),
    **_limited("other positions in training", use_pos_skipping=(False, None)),
    **_irrelevant("used with `s2` only", "s2_scales s2_max_split_size s2_resize_output_to_scale_idx"),
    **_irrelevant("used with a resampler or with pooling only",
                  "mm_spatial_pool_mode mm_spatial_pool_out_channels mm_newline_position mm_resampler_location"),
    **_irrelevant("used with image_aspect_ratio `anyres` only",
                  "image_grid_pinpoints image_crop_resolution image_split_resolution"),
    **_irrelevant("adds a token to the vocabulary, which no prompt has", "mm_use_im_patch_token im_patch_token"),
    **_irrelevant("says what was trained, and how", """
        tune_mm_mlp_adapter tune_mm_vision_resampler freeze_mm_mlp_adapter freeze_mm_vision_resampler
        unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr mm_tunable_parts pretrain_mm_mlp_adapter
        tokenizer_padding_side tokenizer_model_max_length pos_skipping_range vision_tower_pretrained"""),
    **_irrelevant("id of a token of the first LLaVA's prompts", "im_start_token im_end_token sep_image_conv_front"),
}
IMAGE_PROCESSOR: Table = {
    **_limited("other pixels", image_mean=(list(CLIP_MEAN), None), image_std=(list(CLIP_STD), None),
               do_normalize=(True, None), do_rescale=(True, None), rescale_factor=(1 / 255, None),
               do_resize=(True, None), resample=(3, None)),
    **_honoured(auto_map=_ANY_MODEL["auto_map"].note),
    **_irrelevant("images become square as the config's image_aspect_ratio says, with the tower's image_size",
                  "size crop_size do_center_crop do_pad pad_size default_to_square aspect_ratio_setting "
                  "image_grid_pinpoints background_color do_convert_rgb image_size"),
    **_irrelevant("says how PyTorch runs it", """
        image_processor_type feature_extractor_type processor_class _valid_processor_keys data_format device
        input_data_format return_tensors disable_grouping do_reduce_labels use_fast image_seq_length patch_size"""),
}


@dataclass(frozen=True)
class Layout:
    """One kind of config file.

    Attributes:
      title: its heading in the page.
      table: all of its entries.
      base: the key of a layout whose entries it has too; the page does not repeat them.
    """

    title: str
    table: Table
    base: str = "any"


LAYOUTS: Mapping[str, Layout] = {
    "any": Layout("In every config of a model", _ANY_MODEL, ""),
    "decoder": Layout("`config.json` of a `LlamaForCausalLM`, and `text_config`", DECODER),
    "rope": Layout("`rope_parameters` and `rope_scaling`", ROPE, ""),
    "vision": Layout("`config.json` of a CLIP tower, and `vision_config`", VISION),
    "eva": Layout("`vision_config` of an EVA-CLIP tower: as a CLIP tower's, but", EVA, "vision"),
    "huggingface": Layout("`config.json` of a `LlavaForConditionalGeneration`", HUGGINGFACE),
    "original": Layout("`config.json` of the original layout (`llava_llama`), in addition to a decoder's", ORIGINAL,
                       "decoder"),
    "image_processor": Layout("`preprocessor_config.json`", IMAGE_PROCESSOR, ""),
}


def check_entries(values: Mapping[str, Any], layout: str, where: str) -> None:
    """Checks all entries of a config file against the table of its layout.

    Entries that the table does not know are reported in one warning.

    Args:
      values: the file's content.
      layout: a key of `LAYOUTS`.
      where: the file, for errors.

    Raises:
      ConvertError: an entry has a value that is not supported, or asks for code of the directory's own.
    """
    table = LAYOUTS[layout].table
    for name, value in values.items():
        entry = table.get(name)
        if entry is not None and entry.use == "limited" and not any(_same(value, one) for one in entry.values):
            allowed = " or ".join(repr(one) for one in entry.values if one is not None or len(entry.values) == 1)
            raise ConvertError(f"{where}: {name} must be {allowed}, got {value!r}: no other value is supported "
                               f"({entry.note})")
    if foreign := foreign_code(values):
        raise ConvertError(f"{where}: auto_map asks to run Python code of the directory ({foreign}), which vocojax "
                           "never does; remove the entry if the model is a plain one")
    if unknown := sorted(str(name) for name in values if name not in table):
        LOG.warning("%s: unknown entries are ignored: %s; if one of them changes what the model computes, the results "
                    "will be wrong", where, ", ".join(unknown))


def _same(value: Any, other: Any) -> bool:
    """Returns whether two values of JSON are the same, floats as they are rounded in published files."""
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    numbers = isinstance(value, int | float) and isinstance(other, int | float)
    if numbers and not isinstance(value, bool) and not isinstance(other, bool):
        return math.isclose(value, other, rel_tol=1e-6)
    return type(value) is type(other) and bool(value == other)


def page() -> str:
    """Returns the text of docs/convert_entries.md."""
    lines = ["# Entries of foreign config files", "",
             "What `open_source` and `launch/convert.py` do with each entry. A value that is not supported is refused",
             "by name; an entry that is not in the table is ignored, and a warning names it.",
             "`python -m vocojax.convert.entries` makes this page."]
    for layout in LAYOUTS.values():
        base = LAYOUTS[layout.base].table if layout.base else {}
        lines += ["", f"## {layout.title}", "", "| entry | use | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {_use(entry)} | {entry.note} |" for name, entry in sorted(layout.table.items())
                  if base.get(name) != entry]
    return "\n".join(lines) + "\n"


def _use(entry: Entry) -> str:
    if entry.use != "limited":
        return entry.use
    return "only " + ", ".join("absent or null" if one is None else f"`{one!r}`" for one in entry.values)


if __name__ == "__main__":
    print(page(), end="")
