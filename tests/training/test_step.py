"""One optimizer step: accumulation, what trains, and the mesh change nothing they should not."""

import dataclasses
import os
import pickle
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers.environment import on_cpu
from vocojax.config import CompressorConfig, ConfigError
from vocojax.data.loader import BatchStream
from vocojax.evaluation.report import loss_curve
from vocojax.models.parameters import abstract, parameters_of, variables_of
from vocojax.models.voco import VocoLlama
from vocojax.parallel.mesh import MeshConfig
from vocojax.training.optimizer import (
    decayed,
    learning_rate_multipliers,
    make_optimizer,
    make_schedule,
    with_multipliers,
)
from vocojax.training.stage import train
from vocojax.training.step import TrainState, make_evaluation, make_objective, make_step


def state_and_batch(stage, visibilities=("voco",)):
    parameters = parameters_of(VocoLlama(stage.model, nnx.Rngs(1), stage.dtype))
    trained = {n: parameters[n] for n in learning_rate_multipliers(parameters, stage.learning_rates)}
    frozen = {n: p for n, p in parameters.items() if n not in trained}
    optimizer = optax.sgd(1.0)
    state = TrainState(jax.numpy.int32(0), trained, frozen, optimizer.init(trained), {})
    batch = next(BatchStream(stage.model, stage.data, stage.batch_size, 0, *visibilities))
    return optimizer, state, batch


def run(stage):
    optimizer, state, batch = state_and_batch(stage)
    model = abstract(lambda: VocoLlama(stage.model, nnx.Rngs(0), stage.dtype))
    return state, *jax.jit(make_step(model, None, optimizer, stage))(state, batch)


def test_accumulation_gives_the_step_of_the_whole_batch(stage):
    _, whole, metrics = run(stage)
    _, parts, metrics_parts = run(dataclasses.replace(stage, accumulate=2))
    assert metrics["targets"] > 0
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_parts[name], rtol=1e-5, err_msg=name)
    for name in whole.trained:
        np.testing.assert_allclose(whole.trained[name], parts.trained[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("remat", ["full", "minimal", "attention_out", "offload"])
def test_rematerialisation_changes_no_step(stage, remat):
    _, kept, _ = run(stage)
    _, again, _ = run(dataclasses.replace(stage, remat=remat))
    for name in kept.trained:
        np.testing.assert_allclose(kept.trained[name], again.trained[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_only_what_trains_changes(stage):
    before, after, _ = run(dataclasses.replace(stage, learning_rates=(("projector/.*", 1.0), (".*", "freeze"))))
    assert all(name.startswith("projector/") for name in after.trained)
    assert all((before.trained[n] != after.trained[n]).any() for n in after.trained)
    assert all((before.frozen[n] == after.frozen[n]).all() for n in after.frozen)


def test_gradient_is_that_of_the_mean_loss(stage):
    """A step of SGD with rate 1 moves by the gradient, which finite differences of the loss confirm."""
    before, after, metrics = run(stage)
    name = "projector/linear_in/kernel"
    direction = np.array(before.trained[name] - after.trained[name])
    direction /= np.linalg.norm(direction)
    optimizer, _, batch = state_and_batch(stage)
    model = abstract(lambda: VocoLlama(stage.model, nnx.Rngs(0), stage.dtype))
    step = jax.jit(make_step(model, None, optimizer, stage))
    losses = []
    for sign in (+1, -1):
        moved = {**before.trained, name: before.trained[name] + sign * 1e-2 * direction}
        losses.append(float(step(before._replace(trained=moved), batch)[1]["loss"]))
    slope = (losses[0] - losses[1]) / 2e-2
    np.testing.assert_allclose(slope, np.linalg.norm(before.trained[name] - after.trained[name]), rtol=2e-2)
    assert float(metrics["loss"]) > 0


def test_random_tokens_are_drawn_for_each_step_and_stay_in_evaluation(stage):
    model = dataclasses.replace(stage.model, compressor=CompressorConfig("random", 1))
    stage = dataclasses.replace(stage, model=model, visibility="causal")
    _, state, batch = state_and_batch(stage, ("causal",))
    model = abstract(lambda: VocoLlama(stage.model, nnx.Rngs(0), stage.dtype))
    objective = jax.jit(make_objective(model, None, stage))
    evaluate = jax.jit(make_evaluation(model, None, stage))
    later = state._replace(step=jax.numpy.int32(7))
    losses = [float(objective(state.trained, at, batch)[0]) for at in (state, later, later)]
    assert losses[0] != losses[1] == losses[2]
    assert float(evaluate(state, batch).loss) == float(evaluate(later, batch).loss)


def test_the_first_rule_that_matches_decides(stage):
    names = list(variables_of(abstract(lambda: VocoLlama(stage.model, nnx.Rngs(0)))))
    rules = (("decoder/embedding", 0.5), ("(vision|decoder)/.*", "freeze"), (".*", 2))
    found = learning_rate_multipliers(names, rules)
    projector = [name for name in names if name.startswith("projector/")]
    assert found == {"decoder/embedding": 0.5, **dict.fromkeys(projector, 2)} and projector


def test_rules_must_cover_every_parameter_and_each_decides_for_one(stage):
    names = list(variables_of(abstract(lambda: VocoLlama(stage.model, nnx.Rngs(0)))))
    with pytest.raises(ConfigError, match=r"must cover every parameter; no regex matches 'projector/linear_in/bias'"):
        learning_rate_multipliers(names, (("decoder/.*", 1.0), ("vision/.*", "freeze")))
    for unused in (("decodr/.*", 1.0), ("vision/.*", "freeze")):
        with pytest.raises(ConfigError, match=re.escape(f"learning_rates has the regex {unused[0]!r}, which decides")):
            learning_rate_multipliers(names, ((".*", 1.0), unused))


def test_multipliers_scale_the_learning_rate_and_nothing_else(stage):
    """Also the weight decay, but neither the clipping nor the state: as if those parameters had another rate."""
    config = dataclasses.replace(stage.optimizer, weight_decay=0.1, warmup_share=0.0)
    parameters = {"a/kernel": np.full((3,), 2.0, np.float32), "b/kernel": np.full((2,), 3.0, np.float32)}
    gradients = {"a/kernel": np.array([1, 2, 30], np.float32), "b/kernel": np.array([-4, 5], np.float32)}

    def moves(rate, multipliers):
        plain = make_optimizer(dataclasses.replace(config, learning_rate=rate), 10)
        optimizer = with_multipliers(plain, multipliers)
        state = optimizer.init(parameters)
        assert jax.tree.structure(state) == jax.tree.structure(plain.init(parameters))
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, parameters)
        return updates

    ones = dict.fromkeys(parameters, 1.0)
    whole, tenth, mixed = moves(1e-2, ones), moves(1e-3, ones), moves(1e-2, ones | {"b/kernel": 0.1})
    np.testing.assert_array_equal(mixed["a/kernel"], whole["a/kernel"])
    np.testing.assert_allclose(mixed["b/kernel"], tenth["b/kernel"], rtol=1e-6)


def test_schedule_warms_up_and_falls_to_zero(stage):
    schedule = make_schedule(dataclasses.replace(stage.optimizer, learning_rate=1.0, warmup_share=0.1), 100)
    assert [round(float(schedule(s)), 3) for s in (0, 5, 10, 55, 100)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_weight_decay_spares_vectors():
    assert decayed({"a/kernel": 0, "a/bias": 0, "norm/scale": 0, "embedding": 0}) == {
        "a/kernel": True, "a/bias": False, "norm/scale": False, "embedding": True}


@pytest.mark.parametrize("mesh", [
    MeshConfig(data=2, fsdp=2, tensor=2), pytest.param(MeshConfig(data=-1), marks=pytest.mark.slow)])
def test_meshes_give_the_same_losses(mesh, stage, tmp_path):
    """Eight virtual devices as data, fsdp and tensor axes, against one device."""
    code = textwrap.dedent("""
        import pickle, sys
        from vocojax.training.stage import train
        train(pickle.load(open(sys.argv[1], "rb")), f"{sys.argv[2]}/eight")
    """)
    stage = dataclasses.replace(stage, batch_size=8, steps=3)
    (tmp_path / "stage.pkl").write_bytes(pickle.dumps(dataclasses.replace(stage, mesh=mesh)))
    command = [sys.executable, "-c", code, str(tmp_path / "stage.pkl"), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, **on_cpu(devices=8)})
    train(stage, tmp_path / "one")
    one, eight = (np.array(loss_curve(tmp_path / name)) for name in ("one", "eight"))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
