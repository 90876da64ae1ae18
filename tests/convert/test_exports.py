"""What is written is what other programs read: transformers, the stages of training, and our own loader on a mesh."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.helpers import checkpoints
from tests.helpers.environment import on_cpu
from vocojax.data.tokenizer import Tokenizer
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.models.parameters import parameters_of
from vocojax.models.voco import Rows
from vocojax.pretrained import export
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.loading import load_card, load_decoder, load_model, save_model
from vocojax.runs.card import ModelCard
from vocojax.runs.parameters import load_model as load_run
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import CheckpointConfig
from vocojax.training.step import TrainState

W = checkpoints.WORDS
PATCHES = 16


def prompt(rng, image_id):
    """A row of ids with an image, for transformers, and the same as our rows."""
    ids = rng.integers(4, W, (1, 24))
    vision = np.full((1, 24), -1)
    ids[0, 1 : 1 + PATCHES], vision[0, 1 : 1 + PATCHES] = image_id, np.arange(PATCHES)
    image = rng.integers(0, 256, (28, 28, 3)).astype(np.uint8)
    positions = jnp.arange(24)[None]
    rows = Rows(jnp.asarray(np.where(vision < 0, ids, 1)), positions, jnp.zeros_like(positions),
                jnp.full_like(positions, 24), jnp.asarray(vision), jnp.asarray(image)[None, None])
    return torch.from_numpy(ids), Image.fromarray(image), rows


def test_transformers_loads_the_huggingface_export(tmp_path):
    """Model, tokenizer, image processor, processor and generation config load from the directory as it is, and what
    they compute from an image and a prompt is what the model that was exported computes."""
    parts = checkpoints.save_parts(tmp_path)
    model = load_model(parts["source"], vision=parts["vision"], projector=parts["projector"],
                       num_vocos=2)
    save_model(model, ModelCard(model.config, Tokenizer.from_directory(parts["source"])), tmp_path / "exported")
    loaded, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    assert loaded.config.voco == {"num_vocos": 2, "token_id": W, "positions": "compact", "init": "learned",
                                  "rows": "shared", "places": "end", "sees": "unit", "reads": "input"}
    processor = LlavaProcessor.from_pretrained(tmp_path / "exported")
    assert processor.tokenizer.convert_tokens_to_ids(["<voco>", "<image>"]) == [W, W + 1]
    assert processor.patch_size == 7
    generation = GenerationConfig.from_pretrained(tmp_path / "exported")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)

    ids, image, rows = prompt(np.random.default_rng(0), loaded.config.image_token_id)
    pixels = processor.image_processor(image, return_tensors="pt").pixel_values
    expected = loaded(input_ids=ids, pixel_values=pixels).logits.detach().numpy()
    logits = jax.jit(lambda rows: model.decoder.logits(model(rows)[0]))(rows)
    tokens = model.config.decoder.num_tokens
    np.testing.assert_allclose(logits[..., :tokens], expected[..., :tokens], rtol=0, atol=1e-4)
    assert (np.asarray(logits[..., tokens:]) == -1e30).all()  # the padding takes part in nothing
    inputs = processor(text="<image> w1 w2", images=image, return_tensors="pt")
    assert inputs.input_ids.shape == (1, PATCHES + 2)


def test_transformers_loads_the_original_export(tmp_path):
    """Of the original layout, transformers itself knows the tokenizer, the image processor and the decoder."""
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    model = load_model(tmp_path / "source")
    save_model(model, load_card(tmp_path / "source"), tmp_path / "exported", "llava")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.convert_tokens_to_ids("<voco>") == W and len(tokenizer) == W + 1
    assert CLIPImageProcessor.from_pretrained(tmp_path / "exported").crop_size == {"height": 28, "width": 28}
    decoder = LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    ids = np.arange(20)[None]
    positions = jnp.asarray(ids)
    mask = IntervalMask(jnp.zeros_like(positions), jnp.full_like(positions, 20))
    run = jax.jit(lambda ids: model.decoder.logits(model.decoder(model.decoder.embed(ids, jnp.float32), ids, mask)[0]))
    expected = decoder(torch.from_numpy(ids)).logits.detach().numpy()
    assert expected.shape[-1] == W + 1
    np.testing.assert_allclose(run(positions)[..., : W + 1], expected, rtol=0, atol=1e-4)


def test_a_stage_starts_from_the_orbax_export(tmp_path):
    """A converted checkpoint is a run of training, and a run of training can be converted."""
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    convert(tmp_path / "source", tmp_path / "run", "orbax", report=lambda _: None)
    expected = parameters_of(load_model(tmp_path / "source"))
    assert len(expected) == 55
    for loaded in (load_run(tmp_path / "run"), load_model(tmp_path / "run")):
        for path, value in parameters_of(loaded).items():
            np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_run_of_training_is_a_source(tmp_path):
    """The newest of its checkpoints, the state of training beside the parameters; the tokenizer is the stage's."""
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    model = load_model(tmp_path / "source")
    values = {"model": dataclasses.asdict(model.config), "data": {"tokenizer": str(tmp_path / "source")}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    run = Checkpoints(tmp_path / "run", CheckpointConfig())
    frozen = {path: value for path, value in parameters_of(model).items() if path.startswith("vision/")}
    for step in (1, 2):
        trained = {path: value * step for path, value in parameters_of(model).items() if path not in frozen}
        parameters = frozen | trained
        moments = {"mu": {"decoder/norm/scale": jnp.ones(32)}}
        run.save(step, TrainState(jnp.int32(step), trained, frozen, moments, {}), {"data": {"seen": step}})
    run.close()
    convert(tmp_path / "run", tmp_path / "out", "llava", verify=True, report=lambda _: None)
    written = parameters_of(load_model(tmp_path / "out"))
    for path, value in parameters.items():
        np.testing.assert_array_equal(written[path], value, err_msg=path)


def test_decoder_alone_loads(tmp_path):
    checkpoints.llama(W).save_pretrained(tmp_path / "source")
    checkpoints.save_tokenizer(tmp_path / "source")
    decoder = load_decoder(tmp_path / "source", dtype=jnp.bfloat16)
    assert decoder.embedding.dtype == jnp.bfloat16 and decoder.embedding.shape == (256, 32)
    with pytest.raises(ValueError, match="holds a decoder alone; pass a vision tower"):
        load_model(tmp_path / "source")


def test_missing_parts_are_drawn_at_random_if_allowed(tmp_path):
    """A stage of alignment begins with a new projector; nothing else may be missing."""
    parts = checkpoints.save_parts(tmp_path)
    with pytest.raises(ValueError, match=r"4 missing tensors: model\.mm_projector\.0\.bias, .*2\.weight"):
        load_model(parts["source"], vision=parts["vision"])
    model = load_model(parts["source"], vision=parts["vision"],
                       allow_missing=[r"model\.mm_projector\..*"])
    assert 0.05 < float(jnp.std(model.projector.linear_in.kernel[...])) < 0.15  # lecun_normal over 128 inputs
    assert not model.projector.linear_in.bias[...].any()


def test_shards(tmp_path, monkeypatch):
    """Large exports are cut into shards with an index, which transformers and we read alike."""
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    model = checkpoints.save_huggingface(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "target", "huggingface", verify=True, report=lambda _: None)
    shards = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(shards) == 18 and shards[0].name == "model-00001-of-00018.safetensors"
    assert max(shard.stat().st_size for shard in shards) < 110_000  # header included
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "target")
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(ours, theirs), name


MESH_SCRIPT = """
import sys, jax, numpy as np
from vocojax.pretrained.loading import load_model
from vocojax.models.parameters import parameters_of
from vocojax.convert.mapped import MappedWeights
from vocojax.parallel.mesh import MeshConfig
from vocojax.parallel.mesh import make_mesh
read, sizes = MappedWeights.read, {}
def counting(self, name, index=None):
  array = read(self, name, index)
  sizes.setdefault(name, []).append(array.size)
  return array
MappedWeights.read = counting
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
sharded = parameters_of(load_model(sys.argv[1], mesh=mesh))
MappedWeights.read = read
whole = parameters_of(load_model(sys.argv[1]))
for name, value in whole.items():
  np.testing.assert_array_equal(sharded[name], value, err_msg=name)
up = sharded['decoder/blocks/up/kernel']
assert [s.data.shape for s in up.addressable_shards] == [(3, 16, 36)] * 4, up.sharding
assert sharded['decoder/embedding'].addressable_shards[0].data.shape == (128, 16)
assert sizes['decoder/blocks/up/kernel'] == [3 * 16 * 36] * 4, sizes  # no device's read is more than its part
print('same')
"""


def test_every_device_of_a_mesh_reads_its_part(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    result = subprocess.run([sys.executable, "-c", MESH_SCRIPT, str(tmp_path / "source")], capture_output=True,
                            text=True, env=on_cpu(devices=4))
    assert result.stdout == "same\n", result.stderr


WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.split('.')[0] == 'torch' else find_spec(name, *args)
"""


def test_launch_script(tmp_path):
    """The command line end to end, without torch in reach."""
    checkpoints.save_huggingface(tmp_path / "source")
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "sitecustomize.py").write_text(WITHOUT_TORCH)
    root = Path(__file__).parents[2]
    run = lambda *arguments: subprocess.run(
        [sys.executable, str(root / "launch" / "convert.py"), *map(str, arguments)], capture_output=True, text=True,
        env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{tmp_path / 'shadow'}:{root}"})
    without = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True,
                             env={"PYTHONPATH": str(tmp_path / "shadow")})
    assert "No module named 'torch'" in without.stderr
    arguments = ["--source", tmp_path / "source", "--target", tmp_path / "out", "--target_layout", "llava",
                 "--dtype", "bfloat16"]
    done = run(*arguments, "--verify")
    assert done.returncode == 0, done.stderr
    assert "vision/blocks/mlp_in/kernel bfloat16 [2, 128, 80]: max |Δ| 0.00" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out'}: sha256 ")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    again = run(*arguments)
    assert again.returncode == 1
    last = again.stderr.splitlines()[-1]
    assert last == f"error: {tmp_path / 'out'}: exists already; name a new directory or remove it"
