"""The loading path of the original code (`llava_llama`), in little: what it opens a directory with, and nothing else.

A program of its own, for transformers 4.37.2: DIRECTORY PIXELS.npy TEXT OUT.npz. It writes the ids of the text by the
slow tokenizer, the image after the tower's own processor, and the logits of BOS, the image's features and the text.
"""

import sys

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)


class OriginalConfig(LlamaConfig):
    model_type = "llava_llama"


class OriginalModel(LlamaModel):
    """A decoder with the projector; the tower is loaded by its name, later."""

    config_class = OriginalConfig

    def __init__(self, config):
        super().__init__(config)
        assert config.use_mm_proj and config.mm_projector_type == "mlp2x_gelu" and not config.mm_use_im_start_end
        self.mm_projector = torch.nn.Sequential(
            torch.nn.Linear(config.mm_hidden_size, config.hidden_size), torch.nn.GELU(),
            torch.nn.Linear(config.hidden_size, config.hidden_size))


class OriginalForCausalLM(LlamaForCausalLM):
    config_class = OriginalConfig

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = OriginalModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@torch.no_grad()
def main(directory: str, pixels: str, text: str, out: str) -> None:
    AutoConfig.register("llava_llama", OriginalConfig)
    tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=False)
    assert not tokenizer.is_fast, type(tokenizer)
    model, report = OriginalForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    assert all(name.startswith("model.vision_tower.") for name in report["unexpected_keys"]), report
    rows = model.lm_head.out_features
    model.resize_token_embeddings(len(tokenizer))
    tower = CLIPVisionModel.from_pretrained(model.config.mm_vision_tower)
    processor = CLIPImageProcessor.from_pretrained(model.config.mm_vision_tower)
    image = processor(Image.fromarray(np.load(pixels)), return_tensors="pt")["pixel_values"]
    hidden = tower(image, output_hidden_states=True).hidden_states[model.config.mm_vision_select_layer]
    vision = model.model.mm_projector(hidden[:, 1:])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    embed = lambda ids: model.get_input_embeddings()(torch.tensor([ids]))
    inputs = torch.cat([embed([tokenizer.bos_token_id]), vision, embed(ids)], 1)
    logits = model(inputs_embeds=inputs).logits
    np.savez(out, ids=ids, image=image.numpy(), logits=logits.numpy(), rows=rows, tokens=len(tokenizer))


if __name__ == "__main__":
    main(*sys.argv[1:])
