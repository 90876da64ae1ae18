"""LoRA beside PEFT's on the same weights: logits, gradients of the factors, and the start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.parity import filled, randomise
from vocojax.config import ConfigError, DecoderConfig, LoraConfig
from vocojax.convert.tables import decoder_rules
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.models.llama import Decoder
from vocojax.models.lora import add_lora, factor_names, merge_factors, with_factors
from vocojax.models.parameters import parameters_of, variables_of, with_parameters
from vocojax.models.voco import VocoLlama

DECODER = DecoderConfig(vocab_size=60, width=32, depth=3, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=72)
THEIRS = {"query": "self_attn.q_proj", "out": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
CONFIG = LoraConfig(rank=4, alpha=10.0, targets=tuple(f"blocks/{name}/kernel" for name in THEIRS))


def factors_of(peft_model, gradients=False):
    """PEFT's factors, or their gradients, as our parameters: [L, in, r] and [L, r, out]."""
    layers = peft_model.base_model.model.model.layers
    found = {}
    for ours, theirs in THEIRS.items():
        for side in ("a", "b"):
            weights = [getattr(layer.get_submodule(theirs), f"lora_{side.upper()}").default.weight for layer in layers]
            arrays = [(w.grad if gradients else w).detach().numpy().T for w in weights]
            found[f"blocks/{ours}/lora/{side}"] = jnp.asarray(np.stack(arrays))
    return found


def test_peft_computes_the_same():
    base = randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5)))
    decoder = filled(Decoder(DECODER, nnx.Rngs(0)), decoder_rules(DECODER, "model.", "lm_head"), base.state_dict(),
                     "decoder/")
    names = [theirs.split(".")[1] for theirs in THEIRS.values()]
    theirs = get_peft_model(base, PeftConfig(r=4, lora_alpha=10, target_modules=names)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    add_lora(decoder, CONFIG, nnx.Rngs(0))
    trained = factors_of(theirs)
    assert trained.keys() == {name for name in parameters_of(decoder) if "lora" in name}
    frozen = {name: value for name, value in parameters_of(decoder).items() if name not in trained}

    ids = np.arange(20)[None]
    weights = np.random.default_rng(0).normal(size=(1, 20, 60)).astype(np.float32)
    mask = IntervalMask(jnp.zeros((1, 20), jnp.int32), jnp.full((1, 20), 20))

    @jax.jit
    def run(trained):
        model = with_parameters(decoder, {**trained, **frozen})
        hidden, _ = model(model.embed(ids, jnp.float32), jnp.asarray(ids), mask, remat="full")
        logits = model.logits(hidden)
        return (logits * weights).sum(), logits

    (_, logits), gradients = jax.value_and_grad(run, has_aux=True)(trained)
    expected = theirs(torch.from_numpy(ids)).logits
    (expected * torch.from_numpy(weights)).sum().backward()
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=1e-4)
    for name, gradient in factors_of(theirs, gradients=True).items():
        assert np.abs(gradient).max() > 0.1, name
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-4, atol=1e-3, err_msg=name)


def test_a_model_begins_as_it_was(tiny_config, tiny_model):
    """And its factors are drawn as PEFT draws them: A uniform within 1 / sqrt(in), B zero."""
    adapted = VocoLlama(tiny_config, nnx.Rngs(0), jnp.float32)
    add_lora(adapted, LoraConfig(rank=8, targets=("decoder/blocks/.*/kernel", "projector/linear_in/kernel")),
             nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    assert (adapted.projector(x) == tiny_model.projector(x)).all()
    variables = variables_of(adapted)
    a, b = (variables[name] for name in factor_names("decoder/blocks/down/kernel"))
    assert (a.shape, b.shape) == ((2, 48, 8), (2, 8, 32))
    assert a.get_metadata()["out_sharding"] == b.get_metadata()["out_sharding"] == ("layers", "mlp", "embed")
    assert not b[...].any()
    assert 0.95 / 48**0.5 < float(jnp.abs(a[...]).max()) <= 1 / 48**0.5
    assert not (a[0] == a[1]).any()
    assert sum("lora" in name for name in variables) == 2 * 8


@pytest.mark.parametrize("target", ["decoder/head/kernel", "decoder/blocks/query", "decoder/blocks/attention_norm/.*"])
def test_a_target_without_a_linear_layer_is_refused(tiny_config, target):
    with pytest.raises(ConfigError, match="matches no kernel of a linear layer"):
        add_lora(VocoLlama(tiny_config, nnx.Rngs(0)), LoraConfig(rank=2, targets=(target,)), nnx.Rngs(1))


def test_merging():
    """W + alpha / rank A B in fp32, whatever the kernel is held in; what has no factors stays as it is."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    saved = {"x/kernel": jnp.asarray(draw(3, 8, 6), jnp.bfloat16), "x/lora/a": draw(3, 8, 2), "x/lora/b": draw(3, 2, 6),
             "y/kernel": draw(8, 6), "y/lora/a": draw(8, 2), "y/lora/b": draw(2, 6), "z/kernel": draw(4)}
    wanted = {name: jax.ShapeDtypeStruct(saved[name].shape, jnp.float32) for name in saved if "kernel" in name}
    reading = with_factors(wanted, saved)
    assert reading.keys() == saved.keys() and reading["x/kernel"].dtype == jnp.bfloat16
    scale = LoraConfig(rank=2, alpha=3.0).scale
    merged = merge_factors({name: jnp.asarray(saved[name]) for name in reading}, wanted, scale)
    for name in ("x", "y"):
        expected = np.asarray(saved[f"{name}/kernel"], np.float64) + 1.5 * (
            saved[f"{name}/lora/a"].astype(np.float64) @ saved[f"{name}/lora/b"])
        np.testing.assert_allclose(merged[f"{name}/kernel"], expected, rtol=1e-6, atol=1e-6)
    assert merged.keys() == wanted.keys() and (merged["z/kernel"] == saved["z/kernel"]).all()
    assert with_factors({"z/kernel": wanted["z/kernel"]}, saved).keys() == {"z/kernel"}


@pytest.mark.parametrize(("values", "message"), [
    ({"rank": -1}, "rank must be >= 1, or 0 for no LoRA, got -1"),
    ({"alpha": 0.0}, "alpha must be > 0"),
    ({"dropout": 1.0}, "dropout must be >= 0 and < 1, got 1.0"),
    ({"rank": 1, "targets": ()}, "targets must name the kernels that get factors"),
    ({"targets": ("(",)}, r"targets has the invalid regex '\('"),
])
def test_config_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LoraConfig(), **values)
