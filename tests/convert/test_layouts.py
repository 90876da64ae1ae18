"""Each published layout, read, written as Orbax, and written back: every value of every tensor is where it was."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CLIPConfig, CLIPModel

from tests.helpers import checkpoints
from vocojax.config import VisionConfig
from vocojax.errors import ConvertError, InputError
from vocojax.inference.assistant import Assistant
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.export import export
from vocojax.pretrained.source import open_source

W = checkpoints.WORDS


def tensors_of(directory):
    """All tensors in a directory's safetensors files."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(written, expected, grown=()):
    """The same names, and the same values bit by bit; `grown` tensors have further rows."""
    assert sorted(written) == sorted(expected)
    for name, tensor in expected.items():
        got = written[name][: len(tensor)] if name in grown else written[name]
        np.testing.assert_array_equal(got, tensor, err_msg=name)


def there_and_back(tmp_path, layout, **source):
    """Converts to Orbax and from there to `layout`; returns the written directory and the lines of the reports."""
    lines = []
    convert(**source, target=tmp_path / "orbax", target_layout="orbax", verify=True, report=lines.append)
    convert(tmp_path / "orbax", tmp_path / "back", layout, verify=True, report=lines.append)
    digests = [line for line in lines if "sha256" in line]
    assert len(digests) == 2 and len({line.split("sha256 ")[1] for line in digests}) == 1
    deltas = [float(line.split("|Δ| ")[1]) for line in lines if "|Δ|" in line]
    assert len(deltas) >= 20 and set(deltas) == {0.0}
    return tmp_path / "back", lines


NEW_IN_HUGGINGFACE = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
NEW_IN_ORIGINAL = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("trained", [True, False])
def test_huggingface(tmp_path, trained):
    """(a) Bit-exact there and back; a vocabulary that has no `<voco>` yet gets its row where the rows were unused."""
    added = ("<image>", "<pad2>", *(["<voco>"] if trained else []))
    checkpoints.save_huggingface(tmp_path / "source", added=added)
    back, _ = there_and_back(tmp_path, "huggingface", source=tmp_path / "source")
    expected = tensors_of(tmp_path / "source")
    expected = {name if name.startswith(("language_model", "multi_modal")) else
                name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in expected.items()}
    if not trained:
        for name in NEW_IN_HUGGINGFACE:
            expected[name] = expected[name].copy()
            expected[name][W + 2] = expected[name][: W + 2].mean(0)
    assert_same(tensors_of(back), expected)
    config = json.loads((back / "config.json").read_text())
    assert config["voco"] == {"num_vocos": 1, "token_id": W + 2, "positions": "compact", "init": "learned",
                              "rows": "shared", "places": "end", "sees": "unit", "reads": "input"}
    assert config["image_token_index"] == W and config["text_config"]["vocab_size"] == 64


def test_huggingface_names_of_version_5_in_memory(tmp_path):
    """(a) The names that models have in memory since transformers 4.52, which some tools save as they are."""
    model = checkpoints.save_huggingface(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "renamed")
    checkpoints.save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                          tmp_path / "renamed" / "model.safetensors")
    assert any(name.startswith("model.language_model.") for name in tensors_of(tmp_path / "renamed"))
    plain, renamed = (open_source(tmp_path / name).weights for name in ("plain", "renamed"))
    for path in plain.shapes:
        np.testing.assert_array_equal(renamed.read(path), plain.read(path), err_msg=path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded-bin"])
def test_original(tmp_path, form):
    """(b) A LLaVA-1.5 whose vocabulary grows by `<voco>`."""
    tensors = checkpoints.original_tensors()
    checkpoints.save_original(tmp_path / "source", tensors, form)
    back, _ = there_and_back(tmp_path, "llava", source=tmp_path / "source")
    written = tensors_of(back)
    assert_same(written, checkpoints.numpy_of(tensors), grown=NEW_IN_ORIGINAL)
    for name in NEW_IN_ORIGINAL:
        assert written[name].shape == (W + 1, 32)
        np.testing.assert_allclose(written[name][W], tensors[name].numpy().mean(0), rtol=0, atol=1e-6)
    config = json.loads((back / "config.json").read_text())
    assert config["vocab_size"] == W + 1 and config["mm_projector_type"] == "mlp2x_gelu"
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["model"]["decoder"]["vocab_padding"] == 195


@pytest.mark.parametrize("tokenizer_knows", [True, False])
def test_released_voco(tmp_path, tokenizer_knows):
    """(b) The released VoCo-LLaMA's vocabulary has the row already, and it stays as it was trained; the buffers that
    its library saved along are left behind."""
    tensors = checkpoints.original_tensors(rows=W + 1)
    buffers = {f"{checkpoints.TOWER}vision_model.embeddings.position_ids": torch.arange(17)[None],
               "model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    checkpoints.save_original(tmp_path / "source", tensors | buffers)
    if not tokenizer_knows:
        checkpoints.save_tokenizer(tmp_path / "source")
    back, _ = there_and_back(tmp_path, "llava", source=tmp_path / "source")
    assert_same(tensors_of(back), checkpoints.numpy_of(tensors))
    card = open_source(tmp_path / "source").card
    assert (card.model.voco.num_vocos, card.template, card.visibility) == (2, "released", "voco")
    assert open_source(tmp_path / "source", num_vocos=4).card.model.voco.num_vocos == 4


def test_a_plain_llava_is_not_taken_for_the_released_model(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    card = open_source(tmp_path / "source").card
    assert (card.model.voco.num_vocos, card.template, card.visibility) == (1, "vicuna_v1", "causal")
    assistant = Assistant.from_pretrained(tmp_path / "source", num_vocos=3, template="released")
    assert (assistant.processor.unit.vocos, assistant.template.name) == (3, "released")
    with pytest.raises(InputError, match="template must be one of"):
        Assistant.from_pretrained(tmp_path / "source", template="v1")


def test_original_without_tower(tmp_path):
    """(b) with the vision tower in a directory of its own, as many published directories need it."""
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(tower=False))
    clip = checkpoints.save_parts(tmp_path / "parts")["vision"]
    back, _ = there_and_back(tmp_path, "llava", source=tmp_path / "source", vision=clip)
    assert_same(tensors_of(back), checkpoints.numpy_of(checkpoints.original_tensors()), grown=NEW_IN_ORIGINAL)


@pytest.mark.parametrize("layout", ["llava", "huggingface"])
def test_parts(tmp_path, layout):
    """(c) Vicuna, CLIP and a projector become one model."""
    back, _ = there_and_back(tmp_path, layout, **checkpoints.save_parts(tmp_path))
    expected = checkpoints.numpy_of(checkpoints.original_tensors())
    if layout == "llava":
        assert_same(tensors_of(back), expected, grown=NEW_IN_ORIGINAL)
        return
    written = tensors_of(back)
    assert len(written) == len(expected)
    assert written["language_model.lm_head.weight"].shape == (W + 2, 32)  # <voco> and <image>
    for name, ours in (("language_model.model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
                       ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
                        f"{checkpoints.TOWER}vision_model.encoder.layers.1.mlp.fc1.bias"),
                       ("multi_modal_projector.linear_2.weight", "model.mm_projector.2.weight")):
        np.testing.assert_array_equal(written[name], expected[ours])


def test_whole_clip_directory(tmp_path):
    """(c) CLIP as published has a text model too, and a head for each."""
    parts = checkpoints.save_parts(tmp_path)
    plain = open_source(parts["source"], vision=parts["vision"], projector=parts["projector"]).weights
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=checkpoints.VISION))
    clip.vision_model.load_state_dict(checkpoints.clip_tensors())
    clip.save_pretrained(tmp_path / "whole")
    assert any(name.startswith("text_model.") for name in tensors_of(tmp_path / "whole"))
    whole = open_source(parts["source"], vision=tmp_path / "whole", projector=parts["projector"]).weights
    for path in plain.shapes:
        np.testing.assert_array_equal(whole.read(path), plain.read(path), err_msg=path)


def test_image_token_that_needs_another_row(tmp_path):
    """(c) A vocabulary that `<voco>` fills to a multiple of 256 grows once more for transformers' `<image>`."""
    parts = checkpoints.save_parts(tmp_path, rows=255)
    checkpoints.save_tokenizer(parts["source"], *(f"<{i}>" for i in range(255 - checkpoints.WORDS)))
    convert(**parts, target=tmp_path / "out", target_layout="huggingface", verify=True, report=lambda _: None)
    assert tensors_of(tmp_path / "out")["language_model.lm_head.weight"].shape == (257, 32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"] == 256
    decoder = open_source(tmp_path / "out").config.decoder
    assert (decoder.vocab_size, decoder.num_tokens) == (256, 256)  # as it was: the export reads the run's caches


def test_parts_without_a_projector(tmp_path):
    """(c) The start of the alignment stage, whose projector is new: whoever opens it must know that one is missing."""
    parts = checkpoints.save_parts(tmp_path)
    lines = []
    convert(parts["source"], tmp_path / "run", "orbax", vision=parts["vision"], verify=True, report=lines.append,
            allow_missing=[r"model\.mm_projector\..*"])
    assert sum("|Δ| 0" in line for line in lines) == 51 and "sha256" in lines[-1]
    with pytest.raises(ConvertError, match="4 missing tensors: projector/linear_in/bias, projector/linear_in/kernel"):
        open_source(tmp_path / "run")
    source = open_source(tmp_path / "run", allow_missing=["projector/.*"])
    assert len(source.weights.shapes) == 51
    with pytest.raises(ConvertError, match="4 missing tensors"):
        export(source, tmp_path / "llava", "llava")


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 16, "num_key_value_heads": 1},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
], ids=["grouped_query", "tied", "wide_heads", "llama3", "linear"])
def test_decoder_alone(tmp_path, changes):
    """(d) Any LLaMA, back as a `LlamaForCausalLM` of the same config."""
    model = checkpoints.llama(W, **changes)
    model.save_pretrained(tmp_path / "source")
    checkpoints.save_tokenizer(tmp_path / "source")
    back, _ = there_and_back_decoder(tmp_path)
    assert_same(tensors_of(back), tensors_of(tmp_path / "source"), grown=NEW_IN_ORIGINAL)
    loaded = type(model).from_pretrained(back)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded(ids).logits[..., :W], model(ids).logits, rtol=0, atol=1e-5)
    for key in ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(loaded.config, key) == getattr(model.config, key), key


def there_and_back_decoder(tmp_path):
    lines = []
    convert(tmp_path / "source", tmp_path / "orbax", "orbax", verify=True, report=lines.append)
    convert(tmp_path / "orbax", tmp_path / "back", "huggingface", verify=True, report=lines.append)
    return tmp_path / "back", lines


@pytest.mark.parametrize("inside", [True, False])
def test_eva_clip(tmp_path, inside):
    """(e) LLaMA-VID's tower, in the checkpoint or in a file of its own; `norm` and `head` are never run, nor kept."""
    eva = checkpoints.eva_tensors()
    kept = {f"{checkpoints.TOWER}{n}": t for n, t in eva.items() if not n.startswith(("norm.", "head."))}
    rest = {**checkpoints.llama(W).state_dict(), **checkpoints.projector_tensors(width=176)}
    checkpoints.save_original(tmp_path / "source", {**rest, **(kept if inside else {})}, mm_hidden_size=176)
    torch.save(eva, tmp_path / "eva_vit_g.pth")
    vision = {} if inside else {"vision": tmp_path / "eva_vit_g.pth"}
    config = open_source(tmp_path / "source", **vision).config.vision
    assert config == VisionConfig("eva", 28, 7, 176, 3, 2, 200, -1, 1e-6)
    back, _ = there_and_back(tmp_path, "llava", source=tmp_path / "source", **vision)
    assert_same(tensors_of(back), checkpoints.numpy_of({**rest, **kept}), grown=NEW_IN_ORIGINAL)


def test_shikra(tmp_path):
    """(f) Three image tokens in the vocabulary, a linear projector, the tower beside the checkpoint."""
    tensors = checkpoints.original_tensors("linear", rows=W + 3, tower=False)
    checkpoints.save_original(tmp_path / "source", tensors, model_type="shikra", mm_projector_type="linear")
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    del values["mm_projector_type"]  # Shikra's config says nothing of it
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    checkpoints.save_tokenizer(tmp_path / "source", "<im_patch>", "<im_start>", "<im_end>")
    clip = checkpoints.save_parts(tmp_path / "parts")["vision"]
    back, _ = there_and_back(tmp_path, "llava", source=tmp_path / "source", vision=clip)
    written = tensors_of(back)
    assert written["model.mm_projector.weight"].shape == (32, 128)
    expected = checkpoints.numpy_of(checkpoints.original_tensors("linear", rows=W + 3))
    assert_same(written, expected, grown=NEW_IN_ORIGINAL)
    assert json.loads((back / "config.json").read_text())["voco"]["token_id"] == W + 3


def test_rounding_is_reported(tmp_path):
    """A target of fewer bits: |Δ| is the rounding, and not zero."""
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    lines = []
    convert(tmp_path / "source", tmp_path / "target", "llava", dtype="bfloat16", verify=True, report=lines.append)
    line = next(line for line in lines if line.startswith("decoder/blocks/query/kernel"))
    assert "bfloat16 [3, 32, 32]" in line and 1e-4 < float(line.split("|Δ| ")[1]) < 4e-3
    import ml_dtypes
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "target").values()} == {np.dtype(ml_dtypes.bfloat16)}
