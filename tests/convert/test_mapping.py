"""The tables are total and unambiguous in both directions, and a table that isn't says so."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocojax.config import PRESETS, CompressorConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from vocojax.convert import tables
from vocojax.convert.mapping import IDENTITY, TRANSPOSE, Rule, Table, leading_ones, patches, vocabulary
from vocojax.errors import ConvertError
from vocojax.pretrained.source import parameter_shapes

EVA_G = VisionConfig("eva", 224, 14, 1408, 39, 16, 6144, -1, 1e-6)
MODELS = {
    **PRESETS,
    "shikra": dataclasses.replace(PRESETS["clip_l_224_vicuna_7b"], projector=ProjectorConfig("linear")),
    "llama_vid": dataclasses.replace(PRESETS["clip_l_224_vicuna_7b"], vision=EVA_G),
    "last_layer": dataclasses.replace(PRESETS["tiny"], vision=dataclasses.replace(PRESETS["tiny"].vision,
                                                                                 select_layer=-1)),
}
# How many tensors the published checkpoints have: 24 CLIP blocks of 16 and 7 beside them, 32 layers of 9 and 3
# beside them, 4 of the projector.
COUNTS = {"clip_l_336_vicuna_7b": 391 + 291 + 4, "clip_l_336_vicuna_13b": 391 + 363 + 4, "shikra": 391 + 291 + 2,
          "llama_vid": 39 * 13 + 4 + 291 + 4}


@pytest.mark.parametrize("name", MODELS)
def test_every_table_fits_its_models(name):
    config = MODELS[name]
    shapes = parameter_shapes(config)
    slots = tables.llava_table(config, config.decoder.num_tokens).resolve(shapes)
    assert len(slots) == COUNTS.get(name, len(slots))
    sizes = {path: 0 for path in shapes}
    for slot in slots.values():
        sizes[slot.path] += int(np.prod(slot.shape))
    padding = config.decoder.vocab_padding * config.decoder.width
    assert {path: int(np.prod(shape)) for path, shape in shapes.items()} == {
        path: size + (padding if path in ("decoder/embedding", "decoder/head/kernel") else 0)
        for path, size in sizes.items()}
    if config.vision.kind == "clip" and config.projector.kind == "mlp2x_gelu":
        assert len(tables.huggingface_table(config, config.decoder.num_tokens).resolve(shapes)) == len(slots)


def test_published_names():
    """Some names as the published files have them."""
    config = PRESETS["clip_l_336_vicuna_7b"]
    original = tables.llava_table(config, 32001).resolve(parameter_shapes(config))
    q_proj = original["model.layers.31.self_attn.q_proj.weight"]
    assert (q_proj.path, q_proj.layer, q_proj.shape) == ("decoder/blocks/query/kernel", 31, (4096, 4096))
    tower = "model.vision_tower.vision_tower.vision_model."
    assert original[f"{tower}embeddings.patch_embedding.weight"].shape == (1024, 3, 14, 14)
    # Hidden state -2 comes out of block 22; block 23 is kept apart.
    assert original[f"{tower}encoder.layers.22.mlp.fc1.weight"][:2] == ("vision/blocks/mlp_in/kernel", 22)
    assert original[f"{tower}encoder.layers.23.mlp.fc1.weight"][:2] == ("vision/final_blocks/mlp_in/kernel", 0)
    assert original["model.mm_projector.2.bias"].path == "projector/linear_out/bias"
    published = tables.huggingface_table(config, 32064)
    for name, canonical in (
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("vision_tower.embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
        ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
    ):
        assert published.canonical(name) == canonical
    assert published.ignores("language_model.model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not published.ignores("language_model.lm_head.weight")


def test_tables_that_do_not_fit_say_what_is_wrong():
    shapes = {"a/kernel": (3, 2, 5), "b": (4,), "c": (7,)}
    rules = (Rule("x.{layer}.w", "a/kernel", TRANSPOSE, range(3)), Rule("b", "b"), Rule("c", "c"))
    slots = Table("good", rules).resolve(shapes)
    assert sorted(slots) == ["b", "c", "x.0.w", "x.1.w", "x.2.w"] and slots["x.1.w"].shape == (5, 2)
    for broken, problem in (
        (rules[:2], "parameter c has no rule"),
        ((*rules, Rule("d", "c")), "parameter c has 2 rules"),
        ((*rules, Rule("e", "e")), "rule e is for e, which the model doesn't have"),
        ((rules[0]._replace(layers=range(4)), *rules[1:]), r"rule x\.\{layer\}\.w has 4 layers, a/kernel 3"),
        ((*rules[:2], Rule("x.{layer}.w", "c", IDENTITY, range(2, 9))), r"tensor x\.2\.w is matched by several"),
    ):
        with pytest.raises(ConvertError, match=problem):
            Table("broken", broken).resolve(shapes)
    with pytest.raises(ConvertError, match="tensor b is matched by several"):
        Table("broken", rules, ignored=("b",)).resolve(shapes)


def test_names_are_matched_whole_and_dots_are_dots():
    rule = Rule("model.layers.{layer}.w", "a", IDENTITY, range(12))
    assert all(rule.matches(f"model.layers.{i}.w") for i in (0, 3, 11))
    for name in ("model.layers.12.w", "model.layers.03.w", "model.layers.1.w.x", "modelXlayers.1.w",
                 "model.layers.-1.w", "xmodel.layers.1.w", "model.layers..w"):
        assert not rule.matches(name), name


def test_baselines_have_no_published_layout():
    config = dataclasses.replace(PRESETS["tiny"], compressor=CompressorConfig("avg_pool"))
    for table in (tables.llava_table, tables.huggingface_table):
        with pytest.raises(ConvertError, match="does not support the compressor 'avg_pool'"):
            table(config, 64)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_transforms_are_inverse(size, patch, width, ones):
    rng = np.random.default_rng(size)
    for transform, shape in ((IDENTITY, (size, width)), (TRANSPOSE, (size, width)),
                             (patches(patch), (width, 3, patch, patch)),
                             (leading_ones(ones), (*(1,) * ones, size, width))):
        tensor = rng.standard_normal(shape)
        parameter = transform.forward(tensor)
        assert transform.shape(parameter.shape) == shape
        np.testing.assert_array_equal(transform.backward(parameter), tensor)


def test_patches_keep_row_column_and_channel():
    """Output 4 of a convolution that looks at row 1, column 0, channel 2 of a patch of edge 2."""
    weight = np.zeros((6, 3, 2, 2))
    weight[4, 2, 1, 0] = 1
    linear = patches(2).forward(weight)
    assert linear.shape == (12, 6) and np.argwhere(linear).tolist() == [[(1 * 2 + 0) * 3 + 2, 4]]


@given(st.integers(2, 40), st.integers(0, 3), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=100)
def test_vocabulary_grows_and_shrinks(rows, gap, is_new, transposed):
    """Rows that were there stay bit by bit; a new row is the mean of those before it; padding is zeros."""
    new_id = rows + gap if is_new else None
    tokens = rows + gap + 1 if is_new else rows
    size = -(-tokens // 64) * 64
    tensor = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
    grow = vocabulary(rows, size, new_id, transposed=transposed)
    parameter = grow.forward(tensor)
    assert parameter.shape == ((3, size) if transposed else (size, 3)) and parameter.dtype == np.float32
    assert grow.shape(parameter.shape) == (rows, 3)
    by_row = parameter.T if transposed else parameter
    np.testing.assert_array_equal(by_row[:rows], tensor)
    if is_new:
        np.testing.assert_allclose(by_row[new_id], tensor.mean(0), rtol=0, atol=1e-6)
    assert not np.delete(by_row[rows:], [gap] if is_new else [], axis=0).any()
    cut = vocabulary(tokens, size, transposed=transposed).backward(parameter)
    np.testing.assert_array_equal(cut, by_row[:tokens])
    longer = vocabulary(size + 2, size, transposed=transposed).backward(parameter)
    assert longer.shape == (size + 2, 3) and not longer[size:].any()


def test_padding_is_in_the_config():
    decoder = DecoderConfig(vocab_size=64, vocab_padding=3)
    assert decoder.num_tokens == 61
    with pytest.raises(ValueError, match=r"voco\.token_id must be below 61"):
        ModelConfig(decoder=decoder, voco=dataclasses.replace(PRESETS["tiny"].voco, token_id=61))
