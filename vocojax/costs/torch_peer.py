"""The peer of `step_times`: the same model as transformers' LLaMA and CLIP with a 4-D mask, run by PyTorch.

This is what the released code does: every position has logits, and the mask is a dense array. Attention is PyTorch's
own (`scaled_dot_product_attention`). Only the layers of the tower whose features are read are run, as in vocojax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vocojax.config import DecoderConfig, ModelConfig, VisionConfig
from vocojax.errors import MissingPackage
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.layout import IGNORE
from vocojax.models.voco import Rows


def require_torch() -> None:
    """Raises `MissingPackage` where PyTorch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingPackage("the comparison needs torch: pip install -e '.[test]'") from error


class Inputs(NamedTuple):
    """The rows that the parts run on.

    Attributes:
      training: rows that are trained on.
      labels_BS: int, their targets or `IGNORE`, not shifted.
      prompt: a row whose next token is wanted.
      units: rows of one image's unit each, by the part that compresses them.
      questions: rows of text that are answered, by the part that does it.
    """

    training: Rows
    labels_BS: np.ndarray
    prompt: Rows
    units: Mapping[str, Rows]
    questions: Mapping[str, Rows]


def parts(config: ModelConfig, inputs: Inputs, kept: int, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Returns the peer's parts as functions without arguments.

    Args:
      config: of the model.
      inputs: see `Inputs`.
      kept: how many of a unit's last tokens' keys and values are kept.
      new_tokens: of an answer.
    """
    import torch

    model = _Peer(config)
    step_inputs, prompt_inputs = _tensors(inputs.training), _tensors(inputs.prompt)
    labels = torch.from_numpy(np.asarray(inputs.labels_BS, np.int64))
    trained = [*model.decoder.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    assert IGNORE == -100  # what transformers leaves out of the loss

    def training_step() -> float:
        loss = model.decoder(**model.inputs(*step_inputs), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def prefill() -> Any:
        return model.decoder(**model.inputs(*prompt_inputs), use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def compression(unit_inputs: tuple[Any, ...]) -> Any:
        _, cache = model.decoder.model(**model.inputs(*unit_inputs), use_cache=True).to_tuple()
        return [(layer.keys[:, :, -kept:].clone(), layer.values[:, :, -kept:].clone()) for layer in cache.layers]

    def decoding(ids: Any) -> Any:
        return model.decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                                      do_sample=False)

    return {
        "training step": training_step, "prefill": prefill,
        **{part: functools.partial(compression, _tensors(rows)) for part, rows in inputs.units.items()},
        **{part: functools.partial(decoding, torch.from_numpy(np.array(rows.ids_BS, np.int64)))
           for part, rows in inputs.questions.items()},
    }


class _Peer:
    """The model in PyTorch, with random weights.

    Attributes:
      decoder: `LlamaForCausalLM`.
      projector: two linear layers with a GELU between them.
      tower: `CLIPVisionModel` up to the selected hidden state.
    """

    def __init__(self, config: ModelConfig):
        import torch
        from transformers import CLIPVisionModel, LlamaForCausalLM

        self.decoder: Any = LlamaForCausalLM(_llama_config(config.decoder))
        self.tower = CLIPVisionModel(_clip_config(config.vision)).eval()
        width = config.decoder.width
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(config.vision.width, width), torch.nn.GELU(), torch.nn.Linear(width, width))

    def inputs(self, ids: Any, vision: Any, pixels: Any, mask: Any, positions: Any) -> dict[str, Any]:
        """Returns the decoder's arguments, with the embeddings of vision tokens in their places."""
        import torch

        with torch.no_grad():
            features = self.tower(pixels).last_hidden_state[:, 1:]
        tokens = self.projector(features).reshape(len(ids), -1, self.decoder.config.hidden_size)
        places = vision.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1])
        placed = tokens.gather(1, places)
        embeddings = torch.where(vision[..., None] >= 0, placed, self.decoder.get_input_embeddings()(ids))
        return {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}


def _llama_config(config: DecoderConfig) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_width,
        intermediate_size=config.mlp_width, tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None, eos_token_id=None)  # so that every answer has its full length


def _clip_config(config: VisionConfig) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.width,
        num_hidden_layers=config.depth + 1 + config.select_layer, num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_width)


def _tensors(rows: Rows) -> tuple[Any, ...]:
    """Returns ids, places of vision tokens, pixels, the dense additive mask and positions, as PyTorch's tensors."""
    import torch

    visible_BSS = IntervalMask(jnp.asarray(rows.start_BS), jnp.asarray(rows.stop_BK)).dense()
    mask = np.where(visible_BSS, np.float32(0), np.finfo(np.float32).min)[:, None]
    images = np.asarray(rows.images_BUHWC, np.float32)
    pixels = np.ascontiguousarray(images.reshape(-1, *images.shape[2:]).transpose(0, 3, 1, 2)) / 255
    integers = (np.array(x, np.int64) for x in (rows.ids_BS, rows.vision_BS, rows.positions_BS))
    ids, vision, positions = map(torch.from_numpy, integers)
    return ids, vision, torch.from_numpy(pixels), torch.from_numpy(mask), positions
