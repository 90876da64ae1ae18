"""Small published checkpoints, made by transformers and torch as their authors' tools make them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = 60  # of the tokenizer, special tokens included
VISION = {"image_size": 28, "patch_size": 7, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
          "intermediate_size": 80}
TEXT = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
TOWER = "model.vision_tower.vision_tower."


def save_tokenizer(directory: Path, *added: str) -> None:
    """A word tokenizer of `WORDS` tokens and the added ones."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS - 4))]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")
    fast.add_tokens(list(added), special_tokens=True)
    fast.save_pretrained(directory)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter at random, so that one in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def llama(vocab_size: int, **changes) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**TEXT, **changes})))


def llava(vocab_size: int, image_id: int, **changes) -> LlavaForConditionalGeneration:
    return randomised(LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        text_config=LlamaConfig(vocab_size=vocab_size, **{**TEXT, **changes}).to_dict(), image_token_index=image_id)))


def save_huggingface(directory: Path, *, rows: int = 64, added: tuple[str, ...] = ("<image>", "<pad2>"), **kwargs):
    """(a) a `LlavaForConditionalGeneration`; returns the torch model."""
    model = llava(rows, image_id=WORDS)
    model.save_pretrained(directory, **kwargs)
    save_tokenizer(directory, *added)
    return model


def original_tensors(projector: str = "mlp2x_gelu", rows: int = WORDS, tower: bool = True) -> dict[str, torch.Tensor]:
    """(b) what the state dict of a `LlavaLlamaForCausalLM` holds."""
    tensors = dict(llama(rows).state_dict())
    if tower:
        tensors |= {f"{TOWER}vision_model.{name}": tensor for name, tensor in clip_tensors().items()}
    return tensors | projector_tensors(projector)


def clip_tensors() -> dict[str, torch.Tensor]:
    return dict(randomised(CLIPVisionModel(CLIPVisionConfig(**VISION)), 1).state_dict())


def projector_tensors(kind: str = "mlp2x_gelu", width: int = 128) -> dict[str, torch.Tensor]:
    first, second = torch.nn.Linear(width, 32), torch.nn.Linear(32, 32)
    layers = {"": first} if kind == "linear" else {"0.": first, "2.": second}
    return {f"model.mm_projector.{prefix}{name}": tensor.detach() for prefix, layer in layers.items()
            for name, tensor in randomised(layer, 2).state_dict().items()}


def eva_tensors(depth: int = 3, width: int = 176, mlp: int = 200) -> dict[str, torch.Tensor]:
    """(e) what `eva_vit_g.pth` holds, `norm` and `head` included."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width), "patch_embed.proj.weight": (width, 3, 7, 7),
              "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
              "head.weight": (10, width)}
    block = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.q_bias": (width,), "attn.v_bias": (width,),
             "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
             "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,),
             "mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def save_original(directory: Path, tensors: Mapping[str, torch.Tensor], form: str = "safetensors", **config) -> None:
    """(b) a directory of the original layout: `form` is safetensors, bin, or sharded-bin."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    values = {**LlamaConfig(vocab_size=rows, **TEXT).to_dict(), "model_type": "llava_llama",
              "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 128, "mm_projector_type": "mlp2x_gelu",
              "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
              "mm_vision_select_feature": "patch", **config}
    (directory / "config.json").write_text(json.dumps(values))
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    elif form == "bin":
        torch.save(dict(tensors), directory / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
        for shard, part in shards.items():
            torch.save({name: tensors[name] for name in part}, directory / shard)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}))
    save_tokenizer(directory, *(["<voco>"] if rows == WORDS + 1 else []))


def save_parts(directory: Path, rows: int = WORDS) -> dict[str, Path]:
    """(c) the parts: a Vicuna directory, a CLIP directory and mm_projector.bin."""
    llama(rows).save_pretrained(directory / "vicuna")
    save_tokenizer(directory / "vicuna")
    randomised(CLIPVisionModel(CLIPVisionConfig(**VISION)), 1).save_pretrained(directory / "clip")
    torch.save(projector_tensors(), directory / "mm_projector.bin")
    return {"source": directory / "vicuna", "vision": directory / "clip", "projector": directory / "mm_projector.bin"}


def numpy_of(tensors: Mapping[str, torch.Tensor], rename: Callable[[str], str] = lambda name: name):
    """A state dict as numpy arrays."""
    return {rename(name): tensor.detach().float().numpy() for name, tensor in tensors.items()}
