"""LoRA adapters that PEFT wrote: torch's base with the adapter computes what the merged model computes here."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers import checkpoints
from vocojax.convert.peft import is_adapter, plain_name
from vocojax.errors import ConvertError
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.loading import load_decoder
from vocojax.pretrained.source import open_source

W = checkpoints.WORDS


@pytest.fixture
def llama(tmp_path):
    """A base in transformers' layout."""
    model = checkpoints.llama(W)
    model.save_pretrained(tmp_path / "base")
    checkpoints.save_tokenizer(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base")


def adapted(base, directory, **config):
    """A PEFT model with random factors, saved."""
    names = ["q_proj", "o_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=names, **config)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("config", [
    {}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.self_attn.o_proj": 40}},
    {"modules_to_save": ["lm_head"]},
], ids=["plain", "rank_stabilised", "patterns", "modules_to_save"])
def test_logits_are_those_of_peft(tmp_path, llama, config):
    theirs = adapted(llama, tmp_path / "adapter", **config)
    ids = torch.arange(W)[None]
    want = theirs(ids).logits.detach().numpy()
    decoder = load_decoder(tmp_path / "adapter")  # its base is where adapter_config.json says
    mask = IntervalMask.causal(1, W)
    hidden, _ = decoder(decoder.embed(jnp.asarray(ids.numpy()), jnp.float32), jnp.arange(W)[None], mask)
    got = np.asarray(decoder.logits(hidden))[..., :W]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_merged_adapter_is_written_and_starts_a_stage(tmp_path, llama):
    merged = adapted(llama, tmp_path / "adapter").merge_and_unload().state_dict()
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ConvertError, match=r"adapter: is a LoRA adapter, and its base model '.*base' is not here;"):
        open_source(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "whole", "huggingface", base=tmp_path / "moved", report=lambda _: None)
    written = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(written[name][: len(tensor)], tensor, atol=1e-6, rtol=1e-6)
    source = open_source(tmp_path / "adapter", base=tmp_path / "moved")
    part = source.weights.read("decoder/blocks/query/kernel", (slice(1, 2), slice(3, 7), slice(0, 5)))
    np.testing.assert_array_equal(part, source.weights.read("decoder/blocks/query/kernel")[1:2, 3:7, :5])


def llava_lora(tmp_path):
    """What LLaVA's LoRA scripts leave: factors, a config, and the projector among other whole tensors."""
    whole = checkpoints.original_tensors()
    base = {name: tensor for name, tensor in whole.items() if "mm_projector" not in name}
    checkpoints.save_original(tmp_path / "base", base)
    shutil.copytree(tmp_path / "base", tmp_path / "lora")
    (tmp_path / "lora" / "model.safetensors").unlink()
    prefix = "base_model.model."
    torch.save({prefix + name: tensor for name, tensor in whole.items() if "mm_projector" in name},
               tmp_path / "lora" / "non_lora_trainables.bin")
    module, generator = "model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2)))
    save_file({f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b},
              tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / "base")}))
    return whole, whole[f"{module}.weight"] + 4.0 * b @ a


def test_llavas_scripts(tmp_path):
    whole, query = llava_lora(tmp_path)
    source = open_source(tmp_path / "lora")
    np.testing.assert_allclose(source.weights.read("decoder/blocks/query/kernel")[0], query.numpy().T, atol=1e-5)
    np.testing.assert_array_equal(source.weights.read("projector/linear_in/kernel"),
                                  whole["model.mm_projector.0.weight"].numpy().T)


def test_a_projector_with_pefts_prefix(tmp_path):
    whole, _ = llava_lora(tmp_path)
    source = open_source(tmp_path / "base", projector=tmp_path / "lora" / "non_lora_trainables.bin")
    np.testing.assert_array_equal(source.weights.read("projector/linear_out/bias"),
                                  whole["model.mm_projector.2.bias"].numpy())


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA', which is not supported here; merge"),
    ({"use_dora": True}, "use_dora is True"), ({"lora_alpha": "8"}, "lora_alpha must be a number"),
    ({"lora_dropout": 1.0}, "lora_dropout must be a number >= 0 and < 1, got 1.0"),
    ({"base_model_name_or_path": "org/absent"}, "is a LoRA adapter, and its base model 'org/absent' is not here"),
    ({"base_model_name_or_path": ""}, "is a LoRA adapter, and its base model '' is not here"),
])
def test_what_an_adapter_says_is_honoured_or_refused(tmp_path, change, message):
    llava_lora(tmp_path)
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConvertError, match=message):
        open_source(tmp_path / "lora")


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: {name.replace("layers.0", "layers.9"): tensor for name, tensor in f.items()}, "does not have"),
    (lambda f: f | {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(31, 2)}, "of shape"),
    (lambda f: dict(list(f.items())[:1]), "has only one of lora_A and lora_B"),
    (lambda f: f | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)}, "kind of adapter"),
])
def test_factors_that_fit_no_tensor_are_refused(tmp_path, change, message):
    llava_lora(tmp_path)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ConvertError, match=message):
        open_source(tmp_path / "lora")


def test_names():
    assert plain_name("base_model.model.model.mm_projector.0.weight") == "model.mm_projector.0.weight"
    assert plain_name("base_model.model.lm_head.modules_to_save.default.weight") == "lm_head.weight"
    assert plain_name("lm_head.weight") == "lm_head.weight"


def test_base_is_for_adapters_only(tmp_path, llama):
    assert not is_adapter(tmp_path / "base")
    with pytest.raises(ConvertError, match="is no LoRA adapter, so it has no base model; leave out --base"):
        open_source(tmp_path / "base", base=tmp_path / "base")
