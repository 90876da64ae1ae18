import pytest

from vocojax.config import PRESETS, ConfigError, ModelConfig, build, preset


def test_presets_are_the_published_models():
    seven = preset("clip_l_336_vicuna_7b")
    assert seven.vision.num_patches == 576 and seven.unit_tokens == 576 and seven.unit_vocos == 1
    assert preset("clip_l_224_vicuna_7b").vision.num_patches == 256
    assert (seven.decoder.vocab_size, seven.decoder.num_tokens, seven.voco.token_id) == (32256, 32001, 32000)
    thirteen = preset("clip_l_336_vicuna_13b").decoder
    assert (thirteen.width, thirteen.depth, thirteen.num_heads, thirteen.mlp_width) == (5120, 40, 40, 13824)
    assert set(PRESETS) == {"tiny", "clip_l_336_vicuna_7b", "clip_l_224_vicuna_7b", "clip_l_336_vicuna_13b"}


def test_baselines_put_their_tokens_in_place_of_the_vision_tokens():
    config = build(ModelConfig, {"compressor": {"kind": "qformer", "num_tokens": 4}})
    assert (config.unit_tokens, config.unit_vocos) == (4, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"voco": {"num_vocos": 0}}, "model.voco.num_vocos must be >= 1, got 0"),
        ({"voco": {"num_voco": 1}}, "model.voco.num_voco is not a key of VocoConfig; did you mean 'num_vocos'?"),
        ({"visoin": {}}, "model.visoin is not a key of ModelConfig; did you mean 'vision'?"),
        ({"decoder": {"depth": "32"}}, "model.decoder.depth must be of type int, got '32'"),
        ({"decoder": {"depth": True}}, "model.decoder.depth must be of type int, got True"),
        ({"decoder": 3}, "model.decoder must be a mapping with the keys of DecoderConfig, got 3"),
        ({"projector": {"kind": "mlp"}}, "model.projector.kind must be one of 'linear', 'mlp2x_gelu', got 'mlp'"),
        ({"decoder": {"num_kv_heads": 3}}, "model.decoder.num_kv_heads must divide num_heads 32, got 3"),
        ({"vision": {"image_size": 335}}, "model.vision.image_size must be a multiple of 14, got 335"),
        ({"compressor": {"kind": "avg_pool", "num_tokens": 2}},
         "model.compressor.num_tokens must be a square number for avg_pool, got 2"),
        ({"compressor": {"kind": "downsample", "num_tokens": 8}},
         "model.compressor.num_tokens must be a square number for downsample, got 8"),
        ({"compressor": {"kind": "avg_pool", "num_tokens": 25}},
         "model.compressor.num_tokens must be the square of a divisor of 24, the tower's patches on a side"),
        ({"compressor": {"kind": "random", "num_tokens": 577}},
         "model.compressor.num_tokens must be <= 576, the tower's patches, for random, got 577"),
    ],
)
def test_errors_name_the_key_and_the_remedy(values, message):
    with pytest.raises(ConfigError) as error:
        build(ModelConfig, values, "model")
    assert str(error.value).startswith(message)


def test_optional_parts_and_numbers_are_read():
    config = build(ModelConfig, {"decoder": {"rope_theta": 500000, "rope_scaling": {"factor": 32}}})
    assert config.decoder.rope_theta == 500000.0 and config.decoder.rope_scaling.factor == 32.0
    assert build(ModelConfig, {"decoder": {"rope_scaling": None}}).decoder.rope_scaling is None


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match="tiny"):
        preset("huge")


@pytest.mark.parametrize(("tokens", "message"), [
    (1, "model.compressor.num_tokens must be one more than a square number for llama_vid: the context token, and"),
    (26, "model.compressor.num_tokens must be the square of a divisor of 24, the tower's patches on a side, plus"),
])
def test_llama_vid_has_a_context_token_and_square_content(tokens, message):
    with pytest.raises(ConfigError) as error:
        build(ModelConfig, {"compressor": {"kind": "llama_vid", "num_tokens": tokens}}, "model")
    assert str(error.value).startswith(message)
    config = build(ModelConfig, {"compressor": {"kind": "llama_vid", "num_tokens": 17}})
    assert (config.unit_tokens, config.unit_vocos, config.question_tokens) == (17, 0, 64)
