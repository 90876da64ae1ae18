"""LoRA runs as adapters: PEFT loads them onto a base with fewer rows and computes what the run's model computes."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

from vocojax.config import LoraConfig, config_to_dict
from vocojax.data.conversation import Turn
from vocojax.errors import ConvertError, InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.prompts import whole_rows
from vocojax.models.lora import add_lora, is_factor
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.adapter import base_name
from vocojax.pretrained.conversion import convert, verify_target
from vocojax.pretrained.loading import save_model
from vocojax.pretrained.source import open_source
from vocojax.runs.card import ModelCard
from vocojax.runs.weights import write_parameters
from vocojax.weights import ParametersInMemory

LORA = LoraConfig(rank=2, alpha=6.0, targets=("decoder/blocks/(query|up)/kernel", "projector/linear_in/kernel"),
                  dropout=0.05)


def lora_model(config):
    """A model with factors that are not zero."""
    model = VocoLlama(config, nnx.Rngs(0), jnp.float32)
    add_lora(model, LORA, nnx.Rngs(1))
    return model


def make_places(root, tiny_config, tiny_model, words):
    """A plain LLaVA without a row for <voco>, a run that trained factors, projector, rows and a norm on it, and its
    adapter; returns the run's model."""
    save_model(tiny_model, ModelCard(tiny_config, words, "short"), root / "exported")
    base = LlavaForConditionalGeneration.from_pretrained(root / "exported")
    base.resize_token_embeddings(words.voco_id)
    for entry in ("voco", "prompt", "vocojax", "auto_map"):
        delattr(base.config, entry)
    base.save_pretrained(root / "base")
    words.save(root / "base")

    model, random = lora_model(tiny_config), np.random.default_rng(0)
    own, changed = parameters_of(tiny_model), ("projector/", "decoder/norm/", "decoder/embedding", "decoder/head/")
    parameters = {}
    for name, value in parameters_of(model).items():
        trained = is_factor(name) or name.startswith(changed)
        parameters[name] = jnp.asarray(random.normal(size=value.shape) * 0.1, jnp.float32) if trained else own[name]
    run = root / "run"
    run.mkdir()
    words.save(run / "tokenizer")
    (run / "config.json").write_text(json.dumps({
        "model": config_to_dict(tiny_config), "data": {"template": "short", "fit": "pad"}, "visibility": "voco",
        "lora": config_to_dict(LORA), "init_from": str(root / "base")}))
    write_parameters(run, ParametersInMemory(parameters), {name: np.dtype(np.float32) for name in parameters})
    convert(run, root / "adapter", "peft", verify=True, report=lambda _: None)
    return with_parameters(model, parameters)


@pytest.fixture(scope="module")
def places(tiny_config, tiny_model, words, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return root, make_places(root, tiny_config, tiny_model, words)


def test_the_readme_loads_what_the_run_computes(places):
    assert_peft_computes(*places)


def test_tied_embeddings(tiny_config, words, tmp_path):
    config = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, tie_embeddings=True))
    assert_peft_computes(tmp_path, make_places(tmp_path, config, VocoLlama(config, nnx.Rngs(3), jnp.float32), words))


def assert_peft_computes(root, model):
    """The README's lines give the logits of the run's model, with the factors apart and merged; so do we."""
    text = (root / "adapter" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 45, 3), dtype=np.uint8))
    image.save(root / "photo.png")
    space: dict = {}
    exec(code.replace("this directory", str(root / "adapter")).replace("photo.png", str(root / "photo.png")), space)
    assert space["answers"].shape[1] > space["inputs"]["input_ids"].shape[1]  # it generated
    theirs, processor = space["model"].eval(), space["processor"]
    content = [{"type": "image"}, {"type": "text", "text": "what color is the shape?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, images=[image])
    assistant = Assistant.from_pretrained(root / "adapter")
    sample = assistant.lay_out((Turn("user", "what color is the shape?"),), 1)
    rows = whole_rows([sample], [assistant.load_images([image])], model.config, assistant.visibility, len(sample))
    logits = jax.jit(lambda model, rows: model.decoder.logits(model(rows)[0]))
    tokens = model.config.decoder.num_tokens
    expected = np.asarray(logits(model, rows))[..., :tokens]
    for peft in (theirs, theirs.merge_and_unload()):
        with torch.no_grad():
            found = peft(**inputs).logits.numpy()[..., :tokens]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.asarray(logits(assistant.model, rows))[..., :tokens], expected, atol=1e-4)


def test_what_is_written(places):
    """Factors as they are stored, and only the modules that the base does not have."""
    root, model = places
    written = load_file(root / "adapter" / "adapter_model.safetensors")
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 6.0, "LORA")
    assert config["base_model_name_or_path"] == str(root / "base")
    layers = "model.language_model.layers"
    whole = ["lm_head", "model.language_model.embed_tokens", "model.language_model.norm",
             "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
    assert config["modules_to_save"] == whole
    parameters, prefix = parameters_of(model), "base_model.model."
    a, b = (parameters[f"decoder/blocks/query/lora/{side}"] for side in "ab")
    for layer in range(2):
        module = f"{prefix}{layers}.{layer}.self_attn.q_proj"
        assert re.fullmatch(config["target_modules"], module.removeprefix(prefix))
        np.testing.assert_array_equal(written[f"{module}.lora_A.weight"], a[layer].T)
        np.testing.assert_array_equal(written[f"{module}.lora_B.weight"], b[layer].T)
    assert not re.fullmatch(config["target_modules"], "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert len(written) == 2 * 2 * 2 + 7 and not any(".bias" in name for name in written if "layers" in name)


def test_an_import_gives_the_same_parameters(places):
    root, model = places
    ours, again = open_source(root / "run"), open_source(root / "adapter")
    assert again.card.visibility == "voco" and again.card.template == "short" and again.config == ours.config
    rows = ours.config.decoder.num_tokens
    for name in ours.weights.shapes:
        found, expected = again.weights.read(name), ours.weights.read(name)
        if name in ("decoder/embedding", "decoder/head/kernel"):
            found, expected = (x[:rows] if name == "decoder/embedding" else x[:, :rows] for x in (found, expected))
        if f"{name.removesuffix('kernel')}lora/a" in parameters_of(model) and name.startswith("decoder"):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


def rewritten(places, directory, change, dtype):
    """The run again with changed parameters, all but the factors in another dtype."""
    root, model = places
    shutil.copytree(root / "run", directory, ignore=shutil.ignore_patterns("checkpoints"))
    parameters = {name: change(name, value) for name, value in parameters_of(model).items()}
    dtypes = {name: np.dtype(np.float32 if is_factor(name) else dtype) for name in parameters}
    write_parameters(directory, ParametersInMemory(parameters), dtypes)
    return directory


def test_a_base_may_be_wider_than_the_run(places, tmp_path):
    """Frozen parameters of a run are the base's rounded to bfloat16."""
    run, lines = rewritten(places, tmp_path / "run", lambda _, value: value, jnp.bfloat16), []
    convert(run, tmp_path / "adapter", "peft", verify=True, report=lines.append)
    assert any(re.fullmatch(r"vision/patch_embedding float32 .*: max \|Δ\| 0\.000\d+", line) for line in lines)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("vision" in name or "layernorm" in name for name in written)


def test_verification_sees_another_factor(places, tmp_path):
    double = lambda name, value: value * (2 if name == "decoder/blocks/query/lora/a" else 1)
    run = rewritten(places, tmp_path / "run", double, np.float32)
    with pytest.raises(ConvertError, match="the target's dtype: decoder/blocks/query/kernel;"):
        verify_target(open_source(run), places[0] / "adapter", lambda _: None)


def test_a_wrong_base_is_refused(places, tmp_path):
    root, _ = places
    write = lambda source, **options: convert(source, tmp_path / "out", "peft", report=lambda _: None, **options)
    with pytest.raises(ConvertError, match="run: can't be the base of an adapter, it is no LLaVA in transformers'"):
        write(root / "run", base=root / "run")
    with pytest.raises(ConvertError, match="has no LoRA factors, so it is no adapter; use --target_layout=huggingface"):
        write(root / "base")
    shutil.copytree(root / "base", tmp_path / "other")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "other")
    model.model.language_model.layers[1].self_attn.q_proj.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ConvertError, match=r"layers\.1\.self_attn\.q_proj\.weight is not the one that .*not the base"):
        write(root / "run", base=tmp_path / "other")
    values = json.loads((root / "run" / "config.json").read_text())
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(values | {"init_from": ""}))
    with pytest.raises(ConvertError, match=r"does not name the one it was started from \(init_from\); pass it as"):
        write(tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_a_base_is_named_as_from_pretrained_takes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert base_name("base") == (str(tmp_path / "base"), None)
    assert base_name("hf://org/llava@v1%2F2") == ("org/llava", "v1/2")
    assert base_name("org/llava") == ("org/llava", None)
    with pytest.raises(InputError, match="'hf://org/llava/inside' is no repository on the hub; write hf://org/name"):
        base_name("hf://org/llava/inside")
