"""Stages with LoRA: what trains, resume, and that whatever reads such a run finds merged weights."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from transformers import LlavaForConditionalGeneration

from tests.helpers.environment import on_cpu
from vocojax.config import ConfigError, LoraConfig, config_to_dict
from vocojax.evaluation.report import loss_curve
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.models.voco import Rows
from vocojax.parallel.mesh import MeshConfig, make_mesh
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.loading import load_model as load_any
from vocojax.runs.checkpoint_files import read_arrays
from vocojax.runs.parameters import SavedParameters, load_model
from vocojax.training import checkpoints
from vocojax.training.config import stage_config
from vocojax.training.program import make_model, make_program
from vocojax.training.stage import train

RULES = (("projector/.*", 0.1), (".*/lora/[ab]", 1.0), ("vision/.*", "freeze"), ("decoder/.*", "freeze"))
LORA = LoraConfig(rank=2, alpha=6.0)
KERNELS = [f"decoder/blocks/{name}/kernel" for name in ("down", "gate", "key", "out", "query", "up", "value")]


@pytest.fixture
def lora_stage(stage, tmp_path):
    """Its base is yet to be trained, by `base`."""
    return dataclasses.replace(stage, lora=LORA, init_from=str(tmp_path / "base"), seed=7, learning_rates=RULES)


@pytest.fixture
def base(stage, tmp_path):
    train(dataclasses.replace(stage, steps=1), tmp_path / "base")
    return saved(tmp_path / "base")


def saved(workdir):
    """Every array of a run's newest checkpoint, factors too, as they lie there."""
    found, device = SavedParameters(workdir), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
              for name, leaf in found.leaves.items()}
    return {name: np.asarray(read_arrays(found.homes[name], {name: leaf})[name], np.float32)
            for name, leaf in wanted.items()}


def merged(arrays):
    """The oracle: W + alpha / rank A B in float64, factors gone."""
    whole = {name: array.astype(np.float64) for name, array in arrays.items() if "/lora/" not in name}
    for name in KERNELS:
        a, b = (arrays[name.replace("kernel", f"lora/{side}")].astype(np.float64) for side in "ab")
        whole[name] += 3.0 * np.einsum("lir,lro->lio", a, b)
    return whole


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        np.testing.assert_allclose(np.asarray(value, np.float32), expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_only_factors_train_and_have_moments(lora_stage):
    program = make_program(lora_stage, make_mesh(MeshConfig()))
    factors = {name.replace("kernel", f"lora/{side}") for name in KERNELS for side in "ab"}
    projector = {f"projector/linear_{part}/{leaf}" for part in ("in", "out") for leaf in ("kernel", "bias")}
    assert program.abstract_state.trained.keys() == factors | projector
    moments = [leaf for leaf in jax.tree.leaves(program.abstract_state.optimizer) if leaf.ndim]
    assert len(moments) == 2 * len(factors | projector)
    assert program.abstract_state.trained["decoder/blocks/query/lora/a"].dtype == jnp.float32


def test_a_run_and_its_export(lora_stage, base, tmp_path):
    """Frozen weights stay, factors learn, and what is loaded and exported is W + scale A B; transformers computes from
    it what the model as it was trained does, with its factors added to the kernels."""
    train(lora_stage, tmp_path / "lora")
    new = [line for line in (tmp_path / "lora" / "parameters.txt").read_text().splitlines() if line.endswith("random")]
    factors = [kernel.replace("kernel", f"lora/{x}") for kernel in KERNELS for x in "ab"]
    assert [line.split()[0] for line in new] == factors
    arrays = saved(tmp_path / "lora")
    for name, array in base.items():
        assert (arrays[name] == array).all() == (not name.startswith("projector/")), name
    assert all(np.abs(arrays[name.replace("kernel", "lora/b")]).max() > 1e-3 for name in KERNELS)
    assert_same(parameters_of(load_model(tmp_path / "lora")), merged(arrays))
    assert_same(parameters_of(load_any(tmp_path / "lora")), merged(arrays))

    convert(tmp_path / "lora", tmp_path / "exported", "huggingface", verify=True, report=lambda _: None)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    model = with_parameters(make_model(lora_stage, nnx.Rngs(0)), {n: jnp.asarray(a) for n, a in arrays.items()})
    tokens = lora_stage.model.decoder.num_tokens
    ids = np.random.default_rng(0).integers(4, tokens - 1, (1, 16))
    positions = jnp.arange(16)[None]
    text = Rows(jnp.asarray(ids), positions, jnp.zeros_like(positions), jnp.full_like(positions, 16),
                jnp.full_like(positions, -1), jnp.zeros((1, 0, 32, 32, 3), jnp.uint8))
    logits = jax.jit(lambda rows: model.decoder.logits(model(rows)[0]))(text)
    expected = theirs(input_ids=torch.from_numpy(ids)).logits.detach().numpy()
    np.testing.assert_allclose(logits, expected[..., :tokens], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_the_next_stage_starts_from_the_sum(lora_stage, base, stage, tmp_path, monkeypatch):
    train(lora_stage, tmp_path / "lora")

    class Killed(BaseException):
        pass

    save = checkpoints.Checkpoints.save

    def kill_at_four(self, step, *rest):
        if step == 4:
            raise Killed
        save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", kill_at_four)
        with pytest.raises(Killed):
            train(lora_stage, tmp_path / "killed")
    train(lora_stage, tmp_path / "killed")
    assert loss_curve(tmp_path / "killed") == loss_curve(tmp_path / "lora")
    arrays, resumed = saved(tmp_path / "lora"), saved(tmp_path / "killed")
    assert all((resumed[name] == array).all() for name, array in arrays.items())

    # The first loss is that of the model it came from.
    train(dataclasses.replace(stage, init_from=str(tmp_path / "base"), steps=1, seed=7), tmp_path / "full")
    np.testing.assert_allclose(loss_curve(tmp_path / "lora")[0], loss_curve(tmp_path / "full")[0], rtol=1e-6)

    plain = dataclasses.replace(lora_stage, lora=LoraConfig(), init_from=str(tmp_path / "lora"), steps=1,
                                learning_rates=(("projector/linear_in/bias", 1.0), (".*", "freeze")))
    train(plain, tmp_path / "next")
    after, expected = saved(tmp_path / "next"), merged(arrays)
    assert_same(after, expected | {"projector/linear_in/bias": after["projector/linear_in/bias"]})
    for layout in ("orbax", "llava"):
        convert(tmp_path / "lora", tmp_path / layout, layout, verify=True, report=lambda _: None)
        written = parameters_of(load_any(tmp_path / layout))
        rows = lora_stage.model.decoder.num_tokens
        cut = {"decoder/embedding": np.s_[:rows], "decoder/head/kernel": np.s_[:, :rows]}
        assert_same({name: value[cut.get(name, ...)] for name, value in written.items()}, expected)
    assert "lora" not in json.loads((tmp_path / "orbax" / "config.json").read_text())


MESH_SCRIPT = """
import json, sys
import jax, numpy as np
from flax import nnx
from vocojax.models.parameters import abstract, variables_of
from vocojax.models.voco import VocoLlama
from vocojax.runs.parameters import load_parameters
from vocojax.training.config import stage_config
from vocojax.parallel.mesh import make_mesh
from vocojax.parallel.shardings import parameter_shardings
from vocojax.training.stage import train
config = stage_config(json.load(open(sys.argv[1])))
train(config, sys.argv[2])
mesh = make_mesh(config.mesh)
model = abstract(lambda: VocoLlama(config.model, nnx.Rngs(0)))
shardings = parameter_shardings(model, mesh)
wanted = {name: jax.ShapeDtypeStruct(variable.shape, np.float32, sharding=shardings[name])
          for name, variable in variables_of(model).items()}
with jax.set_mesh(mesh):
    merged = load_parameters(sys.argv[2], wanted)
assert all(merged[name].sharding == leaf.sharding for name, leaf in wanted.items())
np.savez(sys.argv[3], **{name.replace("/", "."): np.asarray(value) for name, value in merged.items()})
"""


@pytest.mark.slow
def test_a_mesh_trains_and_merges_the_same(lora_stage, base, tmp_path):
    """Factors sharded over fsdp and tensor axes: the losses of one device, and the sum read onto the mesh."""
    train(lora_stage, tmp_path / "one")
    meshed = dataclasses.replace(lora_stage, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    (tmp_path / "stage.json").write_text(json.dumps(config_to_dict(meshed)))
    command = [sys.executable, "-c", MESH_SCRIPT, *(str(tmp_path / name) for name in ("stage.json", "four", "m.npz"))]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, **on_cpu(devices=4)})
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(loss_curve(tmp_path / "four"), loss_curve(tmp_path / "one"), rtol=1e-5)
    values = {name.replace(".", "/"): value for name, value in np.load(tmp_path / "m.npz").items()}
    assert_same(values, merged(saved(tmp_path / "four")))


def test_rules_that_train_the_kernel_or_freeze_the_factors_are_refused(lora_stage, stage):
    mesh = make_mesh(MeshConfig())
    for rules in (stage.learning_rates, (("projector/.*", 1.0), (".*", "freeze"))):
        with pytest.raises(ConfigError, match="learning_rates must freeze 'decoder/blocks/down/kernel' and train its "):
            make_program(dataclasses.replace(lora_stage, learning_rates=rules), mesh)


def test_the_config_file(lora_stage):
    """Its rules are those of this test, so they cover every parameter once."""
    space: dict = {}
    exec(Path(__file__).parents[2].joinpath("configs/voco_lora.py").read_text(), space)
    values = space["get_config"]()
    assert isinstance(values, ConfigDict)
    values.data.update(tokenizer="t", path="p", image_root="i")
    config = stage_config(values)
    assert config.learning_rates == RULES
    assert (config.lora.rank, config.lora.scale, config.lora.targets) == (128, 2.0, LORA.targets)
