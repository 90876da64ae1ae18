"""LoRA's dropout: what is dropped, on what the masks depend, and where nothing is dropped."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from tests.training.test_plans import on_eight_devices_with_dropout
from vocojax.config import ConfigError, LoraConfig
from vocojax.data.loader import BatchStream
from vocojax.evaluation.report import loss_curve
from vocojax.models.layers import Linear
from vocojax.models.lora import LowRank, row_keys, with_dropout
from vocojax.models.parameters import abstract, parameters_of
from vocojax.parallel.mesh import MeshConfig, make_mesh
from vocojax.training.optimizer import learning_rate_multipliers
from vocojax.training.plan import deal
from vocojax.training.program import make_model, make_program
from vocojax.training.stage import train
from vocojax.training.step import TrainState, make_evaluation, make_objective, make_step, numbered

RULES = (("projector/.*", 1.0), (".*/lora/[ab]", 1.0), (".*", "freeze"))
RATE = 0.25


@pytest.fixture
def dropping(stage):
    return dataclasses.replace(stage, lora=LoraConfig(rank=2, alpha=6.0, dropout=RATE), learning_rates=RULES)


def two_stages(stage):
    data = dataclasses.replace(stage.data, row_length=12, images_per_row=4)
    return dataclasses.replace(stage, data=data, plan="two_stage", unit_chunk=2, batch_size=2)


def state_and_batch(stage):
    """A state whose factors are both filled, and a batch of the stage's plan."""
    parameters = parameters_of(make_model(stage, nnx.Rngs(1)))
    random = np.random.default_rng(0)
    parameters = {n: jnp.asarray(random.normal(size=p.shape) * 0.1, p.dtype) if "/lora/b" in n else p
                  for n, p in parameters.items()}
    trained = {n: parameters[n] for n in learning_rate_multipliers(parameters, stage.learning_rates)}
    frozen = {n: p for n, p in parameters.items() if n not in trained}
    batch = next(BatchStream(stage.model, stage.data, stage.batch_size, 0, "voco", plan=stage.plan))
    batch = deal(batch, 1, stage.accumulate) if stage.plan == "two_stage" else batch
    return TrainState(jnp.int32(0), trained, frozen, optax.sgd(1.0).init(trained), {}), batch


def model_of(stage):
    return abstract(lambda: make_model(stage, nnx.Rngs(0)))


def stepped(stage):
    """Returns the trained parameters after one step of SGD."""
    step = make_step(model_of(stage), None, optax.sgd(1.0), stage)
    return jax.jit(step)(*state_and_batch(stage))[0].trained


def layer(width=24, out=6, rate=RATE, seed=0):
    """LoRA's term of one linear layer, with both factors filled."""
    linear = Linear(width, out, ("embed", "mlp"), use_bias=False, rngs=nnx.Rngs(seed))
    lora = LowRank(linear.kernel, LoraConfig(rank=4, alpha=8.0, dropout=rate), nnx.Rngs(seed + 1))
    lora.b[...] = jax.random.normal(jax.random.key(seed + 2), lora.b.shape)
    return lora


def test_the_formula_with_a_fixed_mask():
    """A's input is mask * x / (1 - rate); each row has the mask of its own key."""
    lora, x_BSE = layer(), jax.random.normal(jax.random.key(5), (3, 7, 24))
    running = with_dropout(lora, row_keys(jax.random.key(9), jnp.arange(3)))
    masks_BSE = jax.vmap(lambda key: jax.random.bernoulli(key, 0.75, (7, 24)))(running.mask_keys[...])
    assert 0.6 < masks_BSE.mean() < 0.9
    assert not (masks_BSE[0] == masks_BSE[1]).all()
    x, mask = np.asarray(x_BSE, np.float64), np.asarray(masks_BSE)
    wanted = 2.0 * (mask * x / 0.75) @ np.asarray(lora.a[...], np.float64) @ np.asarray(lora.b[...], np.float64)
    np.testing.assert_allclose(running(x_BSE.reshape(-1, 24)), wanted.reshape(-1, 6), rtol=1e-4, atol=1e-5)
    assert lora.mask_keys is None  # the model that was given is as it was


def test_mean_and_spread_over_many_masks_are_those_of_peft():
    """One token 20000 times, each with a mask of its own: the mean is the term without dropout, and the spread that
    of independent elements, as PEFT's layer in training has them."""
    count, lora, x_E = 20_000, layer(), np.asarray(jax.random.normal(jax.random.key(5), (24,)))
    running = with_dropout(lora, row_keys(jax.random.key(3), jnp.zeros(1, jnp.int32)))
    ours = np.asarray(running(jnp.tile(x_E, (count, 1))))
    base = torch.nn.Sequential(torch.nn.Linear(24, 6, bias=False))
    theirs = get_peft_model(base, PeftConfig(r=4, lora_alpha=8, lora_dropout=RATE, target_modules=["0"]))
    inner = theirs.base_model.model[0]
    inner.base_layer.weight.data.zero_()
    inner.lora_A.default.weight.data = torch.from_numpy(np.array(lora.a[...].T))
    inner.lora_B.default.weight.data = torch.from_numpy(np.array(lora.b[...].T))
    torch.manual_seed(0)
    expected = theirs.train()(torch.from_numpy(x_E.copy()).repeat(count, 1)).detach().numpy()
    whole = np.asarray(lora(x_E[None]))[0]
    spread = expected.std(0)
    for found in (ours, expected):
        np.testing.assert_allclose(found.mean(0), whole, atol=4 * float(spread.max()) / count**0.5)
    np.testing.assert_allclose(ours.std(0), spread, rtol=0.03)


def test_every_layer_projection_row_and_step_has_its_own_masks(dropping):
    """Also when the rows run in two parts: a part's masks are those of its rows."""
    model = make_model(dropping, nnx.Rngs(0))
    running = with_dropout(model, row_keys(jax.random.key(0), jnp.arange(4)))
    keys = [jax.random.key_data(module.mask_keys[...]).reshape(-1, 2) for _, module in nnx.iter_modules(running)
            if isinstance(module, LowRank)]
    assert sum(map(len, keys)) == 7 * 2 * 4  # projections x layers x rows
    assert len({tuple(key) for key in np.concatenate(keys).tolist()}) == 7 * 2 * 4
    objective = jax.jit(lambda state, batch: make_objective(model_of(dropping), None, dropping)(
        state.trained, state, batch)[0])
    state, batch = state_and_batch(dropping)
    same = {**{name: np.repeat(array[:1], 4, axis=0) for name, array in batch.items()}, "row": np.zeros(4, np.int32)}
    loss = float(objective(state, same))
    assert loss == float(objective(state, same))
    assert abs(loss - float(objective(state, numbered(same)))) > 1e-4
    assert abs(loss - float(objective(state._replace(step=jnp.int32(1)), same))) > 1e-4


@pytest.mark.parametrize("plan", ["single_pass", "two_stage"])
def test_rematerialisation_and_parts_change_no_step(dropping, plan):
    stage = two_stages(dropping) if plan == "two_stage" else dropping
    found, wanted = stepped(dataclasses.replace(stage, remat="full", accumulate=2)), stepped(stage)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_nothing_is_drawn_without_dropout_and_in_validation(dropping):
    def program(make, stage):
        state, batch = state_and_batch(stage)
        arguments = (optax.sgd(1.0),) if make is make_step else ()
        return str(jax.make_jaxpr(make(model_of(stage), None, *arguments, stage))(state, batch))

    for stage in (dropping, two_stages(dropping)):
        without = dataclasses.replace(stage, lora=dataclasses.replace(stage.lora, dropout=0.0))
        assert "random" in program(make_step, stage)
        for text in (program(make_step, without), program(make_evaluation, stage)):
            assert "random" not in text and "threefry" not in text and "key<" not in text


def test_a_resumed_run_has_the_same_losses(dropping, tmp_path):
    stage = dataclasses.replace(dropping, log_every=1)
    train(stage, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(stage, tmp_path / "again")
    assert loss_curve(tmp_path / "again") == loss_curve(tmp_path / "whole")
    assert [step for step, _ in loss_curve(tmp_path / "whole")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_eight_devices_draw_the_masks_of_one(dropping, words, tmp_path):
    for difference in on_eight_devices_with_dropout(dropping, words, tmp_path):
        assert difference <= 1e-4


def test_targets_outside_the_decoder_have_no_dropout(dropping):
    lora = dataclasses.replace(dropping.lora, targets=("decoder/blocks/.*/kernel", "projector/linear_in/kernel"))
    rules = (("projector/linear_in/kernel", "freeze"), *RULES)
    with pytest.raises(ConfigError, match=r"lora\.dropout is only for targets in the decoder's layers"):
        make_program(dataclasses.replace(dropping, lora=lora, learning_rates=rules), make_mesh(MeshConfig()))
