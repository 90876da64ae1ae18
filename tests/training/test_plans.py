"""Two plans, one loss: a single pass over whole samples and units before texts agree in logits, loss and gradients."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import run_processes as runs
from tests.helpers.environment import on_cpu
from vocojax.config import ConfigError, LoraConfig
from vocojax.data.packing import Item, row_shape
from vocojax.data.text_rows import text_row_shape
from vocojax.evaluation.report import loss_curve
from vocojax.layout import IGNORE, Span, lay_out_sample, lay_out_unit, unit_shape
from vocojax.models.parameters import abstract, parameters_of, with_parameters
from vocojax.training.config import CheckpointConfig, DistillConfig
from vocojax.training.plan import deal, hidden_states
from vocojax.training.program import make_model
from vocojax.training.step import TrainState, make_objective

ROOT = Path(__file__).parent.parent.parent
UNITS, LENGTH = 4, 14  # of a row of text
SIDE, TOKENS = 40, 25  # of an image, in pixels and vision tokens; nothing else has 25 of anything
RECIPES = {"rows": "own", "places": "spread", "sees": "band"}  # of units with several VoCo tokens
DRAWN = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=6)


def plans_of(stage, vocos, chunk):
    """The stage in its two plans; a row of whole samples has room for all that a row of text has."""
    model = dataclasses.replace(
        stage.model, voco=dataclasses.replace(stage.model.voco, num_vocos=vocos, **(RECIPES if vocos > 1 else {})),
        vision=dataclasses.replace(stage.model.vision, image_size=SIDE, patch_size=8),
    )
    unit = 1 + model.unit_tokens + 1 + vocos
    single = dataclasses.replace(stage, model=model, remat="full", data=dataclasses.replace(
        stage.data, row_length=LENGTH + UNITS * unit, images_per_row=UNITS))
    return single, dataclasses.replace(single, plan="two_stage", unit_chunk=chunk, data=dataclasses.replace(
        single.data, row_length=LENGTH))


def batches_of(drawn, single, double, words, seed):
    """The same samples in the same rows for both plans. A sample is (units, words of a thread, threads).

    Their texts read all, or one or two fewer, of the VoCo tokens.
    """
    random, unit = np.random.default_rng(seed), unit_shape(single.model)
    whole = row_shape(single.data, SIDE, unit.tokens, "voco")
    text = text_row_shape(double.data, SIDE, unit, lay_out_unit("unit", words, unit))
    rows = [[] for _ in range(single.batch_size)]
    for number, (units, length, threads) in enumerate(drawn):
        spans = [[Span("red " * length), Span("yes no", True)]] * (threads if units else 1)
        layout = dataclasses.replace(lay_out_sample("x", units, spans, words, unit, 1000), unread=number % unit.vocos)
        images = tuple(random.integers(0, 255, (units, SIDE, SIDE, 3), dtype=np.uint8))
        row = rows[number % len(rows)]
        row.append(Item(layout, images))
        if sum(text.size(item.layout).tokens for item in row) > LENGTH or sum(len(i.images) for i in row) > UNITS:
            row.pop()
    stacked = lambda shape: {name: np.stack([shape.pack(row)[name] for row in rows]) for name in shape.pack([])}
    return stacked(whole), stacked(text)


@functools.cache
def compiled(config):
    """(trained, frozen, batch) -> ((loss, (sums, logits at targets)), gradients)."""
    model = abstract(lambda: make_model(config, nnx.Rngs(0)))
    objective = make_objective(model, None, config)

    def run(trained, frozen, batch):
        state = TrainState(None, {}, frozen, (), {})
        loss, sums = objective(trained, state, batch)
        whole = with_parameters(model, {**trained, **frozen})
        states_BTE = jnp.take_along_axis(
            hidden_states(whole, batch, config), batch["target_index"][..., None], axis=1)
        return loss, (sums, jax.lax.stop_gradient(whole.decoder.logits(states_BTE)))

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def parameters(config, seed=3):
    """(what trains, the rest): with LoRA its factors, both filled, and else everything; and the projector."""
    values = parameters_of(make_model(config, nnx.Rngs(seed)))
    random = np.random.default_rng(seed)
    values = {n: v + (0.02 * random.normal(size=v.shape)).astype(np.float32) if "/lora/b" in n else v
              for n, v in values.items()}
    trained = {n: v for n, v in values.items() if not config.lora.rank or "/lora/" in n or n.startswith("projector")}
    return trained, {n: v for n, v in values.items() if n not in trained}


def assert_gradients_agree(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "vision/blocks/attention/key/bias":
            continue  # a softmax does not change with it: the gradient is 0, and what is found is rounding
        largest = float(np.abs(value).max())
        np.testing.assert_allclose(found[name], value, atol=1e-4 * largest + 1e-12, err_msg=name)


def test_both_plans_give_one_loss_and_one_gradient(stage, words):
    @settings(max_examples=10, deadline=None)
    @given(drawn=DRAWN, case=st.sampled_from([(3, 4, 0), (1, 2, 2)]), seed=st.integers(0, 99))
    def agree(drawn, case, seed):
        vocos, chunk, rank = case
        single, double = plans_of(dataclasses.replace(stage, batch_size=2, lora=LoraConfig(rank=rank)), vocos, chunk)
        whole, text = batches_of(drawn, single, double, words, seed)
        assert (whole["target_ids"] == text["target_ids"]).all()
        trained, frozen = parameters(single)
        (loss, (sums, logits_BTV)), wanted = compiled(single)(trained, frozen, whole)
        (found_loss, (found_sums, found_BTV)), found = compiled(double)(trained, frozen, deal(text, 1))
        np.testing.assert_allclose(found_loss, loss, rtol=1e-4)
        assert found_sums.num_targets == sums.num_targets
        is_target_BT = whole["target_ids"] != IGNORE
        np.testing.assert_allclose(found_BTV[is_target_BT], logits_BTV[is_target_BT], rtol=1e-4, atol=1e-4)
        assert_gradients_agree(found, wanted)

    agree()



def report_of_eight_devices(stage, words, folder, *arguments):
    """The report of `helpers/plans_on_devices.py`, which runs both plans with eight virtual devices."""
    (folder / "stage.pkl").write_bytes(pickle.dumps(stage))
    words.save(folder / "tokenizer")
    environment = {**os.environ, **on_cpu(devices=8)}
    command = [sys.executable, "-m", "tests.helpers.plans_on_devices", folder / "stage.pkl", folder / "tokenizer",
               *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, cwd=ROOT).stdout)


def on_eight_devices_with_dropout(stage, words, folder):
    """The largest relative difference between eight devices' gradients and one's, for each plan."""
    return report_of_eight_devices(stage, words, folder, 2, 4, 1, "dropout")["dropout"]


def on_eight_devices(stage, words, folder, *mesh):
    """What both plans move on a mesh of eight devices, where their losses and gradients are checked."""
    report = report_of_eight_devices(stage, words, folder, *mesh)
    wanted, *found = report["losses"]
    assert max(abs(loss - wanted) for loss in found) <= 1e-4 * wanted
    worst = report["worst"]
    worst.pop("vision/blocks/attention/key/bias")  # see `assert_gradients_agree`
    assert max(worst.values()) <= 1e-4, worst
    return {int(images): entries for images, entries in report["moved"].items()}


def test_eight_devices_agree_and_exchange_keys_and_values_alone(stage, words, tmp_path):
    """Each has one row, of 4 and of 8 units in one chunk. 768 bytes are the keys and values of a unit of 3 VoCo tokens:
    2 x 2 layers x 3 x 2 heads x 8 x 4 bytes."""
    moved = on_eight_devices(stage, words, tmp_path, 2, 4, 1)
    for entries in moved.values():
        for op, _, arrays in entries:
            assert not any(size % TOKENS == 0 or size % SIDE == 0 for array in arrays for size in array), (op, arrays)
    for op in ("all-gather", "reduce-scatter"):  # forwards, and the gradients' way back
        small, large = (sum(size for name, size, _ in moved[images] if name == op) for images in (4, 8))
        assert 32 * 768 <= large - small <= 1.1 * 32 * 768, op
    others = [sum(size for op, size, _ in moved[images] if op not in ("all-gather", "reduce-scatter"))
              for images in (4, 8)]
    assert others[0] == others[1]


@pytest.mark.slow
def test_a_mesh_with_a_tensor_axis_agrees(stage, words, tmp_path):
    on_eight_devices(stage, words, tmp_path, 2, 2, 2)


def train_and_note_batches(config, workdir, notes):
    """Trains, and adds a line with the digest of every batch that is put on the devices to a file."""
    from vocojax.training import plan, stage

    place = plan.place

    def noted(batch, *rest):
        content = b"".join(name.encode() + np.asarray(batch[name]).tobytes() for name in sorted(batch))
        with open(notes, "a") as file:
            file.write(hashlib.sha256(content).hexdigest() + "\n")
        return place(batch, *rest)

    plan.place = noted
    stage.train(config, workdir)


def test_a_killed_run_in_two_stages_resumes_with_the_same_batches_and_losses(stage, tmp_path):
    """Rows of up to four units and twelve tokens of text, which no row of whole samples would hold."""
    start = lambda name, notes: runs.start_work(functools.partial(
        train_and_note_batches, stage, str(tmp_path / name), str(tmp_path / notes)), tmp_path / name)
    data = dataclasses.replace(stage.data, row_length=12, images_per_row=4)
    stage = dataclasses.replace(stage, data=data, plan="two_stage", unit_chunk=2, batch_size=2, steps=12, log_every=1,
                                checkpoint=CheckpointConfig(every=2, keep=2))
    assert runs.finish(start("whole", "all")) == [0], runs.logs(tmp_path / "whole")
    (child,) = start("killed", "before")
    runs.wait_until(lambda: (tmp_path / "killed" / "checkpoints" / "4").exists(), child)
    runs.kill(child)
    assert runs.finish([child]) == [-signal.SIGKILL], runs.logs(tmp_path / "killed")
    assert runs.finish(start("killed", "after")) == [0], runs.logs(tmp_path / "killed")
    batches, before, after = ((tmp_path / name).read_text().splitlines() for name in ("all", "before", "after"))
    assert len(batches) == len(set(batches)) == 12
    assert len(before) >= 4 and before == batches[:len(before)]
    assert len(after) <= 8 and after == batches[-len(after):]
    assert loss_curve(tmp_path / "killed") == loss_curve(tmp_path / "whole")
    assert [step for step, _ in loss_curve(tmp_path / "whole")] == list(range(1, 13))


def test_what_two_stages_can_t_compute_is_refused(stage):
    with pytest.raises(ConfigError, match="visibility must be 'voco' for plan 'two_stage', whose units run alone"):
        dataclasses.replace(stage, plan="two_stage", visibility="causal")
    with pytest.raises(ConfigError, match=r"distill\.teacher must be '' for plan 'two_stage'"):
        dataclasses.replace(stage, plan="two_stage", distill=DistillConfig(teacher="runs/upper_bound"))
