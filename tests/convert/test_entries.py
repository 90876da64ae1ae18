"""Every entry of a foreign config is honoured, refused or known to be irrelevant; any other one is reported."""

import json
import logging
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

from tests.helpers import checkpoints
from vocojax.config import ConfigError, DecoderConfig, RopeScalingConfig, VisionConfig
from vocojax.convert import huggingface
from vocojax.convert.entries import LAYOUTS, check_entries, page
from vocojax.errors import ConvertError
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.source import open_source

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


@pytest.fixture
def source(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    return tmp_path / "source"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(LAYOUTS)), st.text(min_size=1), st.none() | st.booleans() | st.text())
def test_an_unknown_entry_is_reported(caplog, layout, name, value):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vocojax"):
        if name in LAYOUTS[layout].table:
            return
        check_entries({name: value}, layout, "c")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"c: unknown entries are ignored: {name};")


@pytest.mark.parametrize("layout", ["original", "huggingface", "llama"])
def test_an_unknown_entry_of_a_directory_is_reported(tmp_path, caplog, layout):
    if layout == "original":
        checkpoints.save_original(tmp_path, checkpoints.original_tensors(), mm_mystery=1)
    elif layout == "huggingface":
        checkpoints.save_huggingface(tmp_path)
        edit(tmp_path / "config.json", mm_mystery=1)
    else:
        checkpoints.llama(checkpoints.WORDS).save_pretrained(tmp_path)
        checkpoints.save_tokenizer(tmp_path)
        edit(tmp_path / "config.json", mm_mystery=1)
    open_source(tmp_path)
    (record,) = caplog.records
    assert "unknown entries are ignored: mm_mystery;" in record.getMessage()


@pytest.mark.parametrize(("layout", "values"), [
    ("decoder", LlamaConfig().to_dict()), ("vision", CLIPVisionConfig().to_dict()), ("vision", CLIPConfig().to_dict()),
    ("huggingface", LlavaConfig().to_dict()),
    ("image_processor", json.loads(CLIPImageProcessor().to_json_string())),
], ids=["llama", "clip", "whole_clip", "llava", "image_processor"])
def test_all_entries_of_transformers_are_known(caplog, layout, values):
    check_entries(values, layout, "c")
    assert not caplog.records


@pytest.mark.parametrize("layout", ["huggingface", "llava"])
def test_exports_have_no_unknown_entry(source, tmp_path, caplog, layout):
    convert(source, tmp_path / "out", layout, verify=True, report=lambda _: None)
    assert not caplog.records


def test_the_page_is_in_step():
    assert (Path(__file__).parents[2] / "docs" / "convert_entries.md").read_text() == page(), (
        "run: python -m vocojax.convert.entries > docs/convert_entries.md")


@pytest.mark.parametrize(("changes", "message"), [
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end must be False, got True"),
    ({"s2": True}, "s2 must be False, got True"),
    ({"mm_resampler_type": "perceiver"}, "mm_resampler_type must be 'identity', got 'perceiver'"),
    ({"sliding_window": 4096}, "sliding_window must be None, got 4096"),
    ({"quantization_config": {"bits": 4}}, "quantization_config must be None, got {'bits': 4}"),
    ({"auto_map": {"AutoConfig": "evil.Evil"}}, "auto_map asks to run Python code of the directory (evil.Evil)"),
    ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, and the vision tower is 128 wide"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters says (10000.0, None) and rope_scaling"),
    ({"rope_theta": 5e5}, "rope_theta is 500000.0, and 10000.0 in rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "rope_parameters.beta is not supported"),
    ({"rope_parameters": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}, "rope_type and type differ"),
    ({"rope_parameters": {"factor": 2.0}}, "factor 2.0 has no effect with type 'default'; name the type"),
    ({"rope_parameters": {"rope_theta": math.nan}}, "rope_theta must be a finite number, got nan"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a finite number above 0, got 0.0"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a finite number, got inf"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a finite number above 0, got -1e-05"),
    ({"mm_vision_tower": "laion/CLIP-ViT-H-14"}, "mm_vision_tower is 'laion/CLIP-ViT-H-14', which is no"),
    ({"mm_vision_tower": ["a"]}, "mm_vision_tower must be of type string, got ['a']"),
])
def test_entries_that_change_what_is_computed_are_refused(source, changes, message):
    edit(source / "config.json", **changes)
    with pytest.raises(ConvertError) as caught:
        open_source(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_both_forms_of_the_rotary_entries_may_agree():
    values = {"rope_theta": 5e5, "rope_scaling": LLAMA_3, "rope_parameters": {**LLAMA_3, "rope_theta": 5e5}}
    decoder = huggingface.read_decoder(values, "c")
    assert (decoder.rope_theta, decoder.rope_scaling) == (5e5, RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(("file", "values"), [
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
    ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
    ("preprocessor_config.json", {"do_normalize": False}),
    ("processor_config.json", {"image_processor": {"resample": 2}}),
])
def test_other_pixels_are_refused(source, tmp_path, file, values):
    (source / file).write_text(json.dumps(values))
    name = next(iter(values.get("image_processor", values)))
    with pytest.raises(ConvertError, match=rf"{file}: {name} must be "):
        open_source(source)
    (source / file).rename(source / "aside")
    clip = checkpoints.save_parts(tmp_path / "parts")["vision"]
    (clip / file).write_text(json.dumps(values))
    edit(source / "config.json", mm_vision_tower=str(clip))
    with pytest.raises(ConvertError, match=rf"clip/{file}: {name} must be "):
        open_source(source)


@pytest.mark.parametrize("relative", [True, False])
def test_the_tower_s_own_config_is_honoured(source, tmp_path, monkeypatch, relative):
    """Heads and epsilon are not in the tensors."""
    home = source / "tower" if relative else tmp_path / "elsewhere" / "tower"
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(
        {**checkpoints.VISION, "num_attention_heads": 4, "layer_norm_eps": 1e-6, "model_type": "clip_vision_model"}))
    edit(source / "config.json", mm_vision_tower="tower" if relative else str(home))
    assert open_source(source).config.vision == VisionConfig("clip", 28, 7, 128, 3, 4, 80, -2, 1e-6)
    edit(home / "config.json", hidden_act="gelu")
    with pytest.raises(ConvertError, match=r"tower/config\.json: hidden_act must be 'quick_gelu', got 'gelu'"):
        open_source(source)


def test_the_config_beside_a_separate_tower_is_honoured(tmp_path):
    """The directory of a tower, or a file in it."""
    parts = checkpoints.save_parts(tmp_path)
    edit(parts["vision"] / "config.json", num_attention_heads=4, layer_norm_eps=1e-6)
    for vision in (parts["vision"], parts["vision"] / "model.safetensors"):
        config = open_source(parts["source"], vision=vision, projector=parts["projector"]).config
        assert (config.vision.num_heads, config.vision.norm_eps) == (4, 1e-6)


def test_a_tower_without_a_name_is_reported(source, caplog):
    edit(source / "config.json", mm_vision_tower=None)
    assert open_source(source).config.vision.num_heads == 2
    assert "names no mm_vision_tower; the tower is taken for one of OpenAI's CLIPs, with 2 heads" in caplog.text


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("make", [
    lambda value: DecoderConfig(rope_theta=value), lambda value: DecoderConfig(norm_eps=value),
    lambda value: VisionConfig(norm_eps=value), lambda value: RopeScalingConfig(factor=value),
    lambda value: RopeScalingConfig(low_freq_factor=value),
], ids=["rope_theta", "norm_eps", "vision_norm_eps", "factor", "low_freq_factor"])
def test_values_that_make_nan_are_refused(make, value):
    with pytest.raises(ConfigError, match="must be a finite number above 0"):
        make(value)
