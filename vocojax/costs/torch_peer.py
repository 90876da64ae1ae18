"""The peer of `step_times`: the same model as transformers' LLaMA and CLIP with a 4-D mask, run by PyTorch.

This is what the released code does: every position has logits, and the mask is a dense array. Attention is PyTorch's
own (`scaled_dot_product_attention`). Only the layers of the tower whose features are read are run, as in vocojax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def parts(
    config: ModelConfig, training: Rows, labels_BS: np.ndarray, prompt: Rows, unit: Rows, kept: int
) -> dict[str, Callable[[], Any]]:
    """Returns the peer's training step, prefill and compression as functions without arguments.

    Args:
      config: of the model.
      training: rows that are trained on.
      labels_BS: int, their targets or `IGNORE`, not shifted.
      prompt: a row whose next token is wanted.
      unit: a row of one image's unit.
      kept: how many of its last tokens' keys and values are kept.
    """
    import torch

    model = _Peer(config)
    step_inputs, prompt_inputs, unit_inputs = (_tensors(rows) for rows in (training, prompt, unit))
    labels = torch.from_numpy(np.asarray(labels_BS, np.int64))
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
    def compression() -> Any:
        _, cache = model.decoder.model(**model.inputs(*unit_inputs), use_cache=True).to_tuple()
        return [(layer.keys[:, :, -kept:].clone(), layer.values[:, :, -kept:].clone()) for layer in cache.layers]

    return {"training step": training_step, "prefill": prefill, "compression": compression}


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

        self.decoder = LlamaForCausalLM(_llama_config(config.decoder))
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
        intermediate_size=config.mlp_width, tie_word_embeddings=config.tie_embeddings)


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
