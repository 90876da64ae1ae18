"""Config files as they were published, read; what can't be computed is in test_errors."""

import copy
import dataclasses
import functools
import json

import pytest

from vocojax.config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    RopeScalingConfig,
    VisionConfig,
    VocoConfig,
    preset,
)
from vocojax.convert import huggingface, llava, tables
from vocojax.errors import ConvertError
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.source import open_source, parameter_shapes

# The keys that say something of the model, as in the files of llava-hf/llava-1.5-7b-hf, liuhaotian/llava-v1.5-7b,
# lmsys/vicuna-7b-v1.5, meta-llama/Llama-3.1-8B and openai/clip-vit-large-patch14-336.
LLAVA_HF = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
        "vocab_size": 32064},
    "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}
VICUNA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
}
LLAVA = VICUNA | {
    "architectures": ["LlavaLlamaForCausalLM"], "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava", "use_mm_proj": True,
}
LLAMA_3 = {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
}
CLIP = {"logit_scale_init_value": 2.6592, "model_type": "clip", "text_config": {"hidden_size": 768}, "vision_config": {
    "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768}}
SEVEN = preset("clip_l_336_vicuna_7b")


def with_vocabulary(rows: int) -> DecoderConfig:
    return dataclasses.replace(SEVEN.decoder, vocab_size=rows, vocab_padding=0)


def test_llava_of_transformers():
    config = huggingface.read_llava(LLAVA_HF, "config.json")
    assert config == dataclasses.replace(SEVEN, decoder=with_vocabulary(32064), voco=VocoConfig(token_id=0))


def test_llava_as_published():
    """The tower is known by its tensors alone."""
    names = tables.llava_table(SEVEN, 32000).resolve(parameter_shapes(SEVEN))
    shapes = {name: slot.shape for name, slot in names.items()}
    vision = llava.vision_of_tensors(LLAVA, shapes, "config.json")
    projector = llava.read_projector(LLAVA, shapes, "config.json")
    config = llava.read_llava(LLAVA, vision, projector, "config.json")
    assert config == dataclasses.replace(SEVEN, decoder=with_vocabulary(32000), voco=VocoConfig(token_id=0))


def test_eva_clip_g_by_its_tensors():
    """LLaVA says nothing of depth, width and heads; the published file has a 40th block that is never run."""
    eva = VisionConfig("eva", 224, 14, 1408, 39, 16, 6144, -1, 1e-6)
    model = ModelConfig(eva, ProjectorConfig(), SEVEN.decoder, SEVEN.voco)
    names = tables.llava_table(model, 32000).resolve(parameter_shapes(model))
    shapes = {name: slot.shape for name, slot in names.items()}
    shapes |= {f"{tables.TOWER}blocks.39.norm1.weight": (1408,)}
    assert llava.vision_of_tensors({}, shapes, "config.json") == eva
    assert tables.llava_table(model, 32000).ignores(f"{tables.TOWER}blocks.39.norm1.weight")


def test_decoders_and_towers_as_published():
    assert huggingface.read_decoder(VICUNA, "config.json") == with_vocabulary(32000)
    stretched = huggingface.read_decoder(VICUNA | {"rope_scaling": {"factor": 4.0, "type": "linear"}}, "config.json")
    assert stretched.rope_scaling == RopeScalingConfig("linear", 4.0)
    assert huggingface.read_decoder(LLAMA_3, "config.json") == DecoderConfig(
        vocab_size=128256, num_kv_heads=8, mlp_width=14336, rope_theta=500000.0,
        rope_scaling=RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192), max_positions=131072)
    assert huggingface.read_vision(CLIP, "config.json") == VisionConfig()


def test_configs_come_back():
    """What is written is read as it was."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    for values in (VICUNA, LLAMA_3, VICUNA | {"rope_scaling": {"factor": 4.0, "type": "linear"}}):
        config = huggingface.read_decoder(values, "config.json")
        assert huggingface.read_decoder(huggingface.write_decoder(config, config.vocab_size, ids), "x") == config
    model = huggingface.read_llava(LLAVA_HF, "config.json")
    written = huggingface.write_llava(model, 32064, ids, image_id=32000)
    assert huggingface.read_llava(written | {"voco": dataclasses.asdict(model.voco)}, "x") == model


@functools.cache
def original_shapes():
    names = tables.llava_table(SEVEN, 32000).resolve(parameter_shapes(SEVEN))
    return {name: slot.shape for name, slot in names.items()}


def read_original(values):
    shapes = original_shapes()
    vision = llava.vision_of_tensors(values, shapes, "c")
    return llava.read_llava(values, vision, llava.read_projector(values, shapes, "c"), "c"), llava.read_fit(values, "c")


def key_paths(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*prefix, key))


@pytest.mark.parametrize(("values", "read"), [
    (LLAVA_HF, lambda values: huggingface.read_llava(values, "c")),
    (LLAVA, read_original),
    (LLAMA_3 | {"head_dim": 128}, lambda values: huggingface.read_decoder(values, "c")),
    (VICUNA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
     lambda values: huggingface.read_decoder(values, "c")),
    (CLIP, lambda values: huggingface.read_vision(values, "c")),
], ids=["llava_hf", "llava", "llama_3", "vicuna", "clip"])
def test_whatever_a_key_holds_is_read_or_refused_in_a_line(values, read):
    also = ["rope_theta", "rope_scaling", "num_key_value_heads", "vision_feature_layer", "vision_config", "text_config",
            "voco"]
    for path in [*key_paths(values), *((key,) for key in also)]:
        for odd in ("64", "x", [], {}, [1], -1, 0, None, 1.5, True, {"a": 1}):
            changed = place = copy.deepcopy(values)
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
            try:
                read(changed)
            except ConvertError as error:
                assert str(error).startswith("c: ") and "\n" not in str(error), error


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": "64"}, "c: hidden_size must be of type integer, got '64'"),
    ({"rope_theta": "high"}, "c: rope_theta must be of type number, got 'high'"),
    ({"rope_scaling": [1]}, "c: rope_scaling must be of type object, got [1]"),
    ({"max_position_embeddings": 0}, "c: max_position_embeddings must be >= 1, got 0"),
])
def test_a_value_of_the_wrong_type(change, message):
    with pytest.raises(ConvertError) as caught:
        huggingface.read_decoder(VICUNA | change, "c")
    assert str(caught.value) == message


def test_positions_and_aspect_ratio_are_carried(tmp_path):
    """Through our own run and out again."""
    from tests.helpers import checkpoints

    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(), image_aspect_ratio="square")
    source = open_source(tmp_path / "source")
    assert (source.config.decoder.max_positions, source.card.fit) == (256, "crop")
    convert(tmp_path / "source", tmp_path / "run", "orbax", report=lambda _: None)
    for layout, part in (("llava", ()), ("huggingface", ("text_config",))):
        convert(tmp_path / "run", tmp_path / layout, layout, verify=True, report=lambda _: None)
        written = json.loads((tmp_path / layout / "config.json").read_text())
        assert functools.reduce(dict.__getitem__, part, written)["max_position_embeddings"] == 256
        assert written["prompt"]["fit"] == open_source(tmp_path / layout).card.fit == "crop"
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["image_aspect_ratio"] == "square"
    with pytest.raises(ConvertError, match=r"c: image_aspect_ratio must be one of pad, square, got 'anyres'"):
        llava.read_fit(LLAVA | {"image_aspect_ratio": "anyres"}, "c")
    assert llava.read_fit(VICUNA, "c") == "pad"


def test_sentencepiece_tokenizer_alone(tmp_path):
    """Published LLaMA directories of the time have a tokenizer.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from tests.helpers import checkpoints

    text = "\n".join(f"the quick brown fox jumps over {i} lazy dogs USER: ASSISTANT:" for i in range(200))
    (tmp_path / "text").write_text(text)
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(rows=320), model_type="llava")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "source" / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, minloglevel=2)
    (tmp_path / "source" / "tokenizer.json").unlink()
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    source = open_source(tmp_path / "source")
    assert source.card.tokenizer.voco_id == source.config.voco.token_id == 320
    assert (source.config.decoder.vocab_size, source.config.decoder.vocab_padding) == (512, 191)
