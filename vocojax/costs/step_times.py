"""Times of training, prefill, compression and decoding beside PyTorch's, measured on this machine's CPU.

Both sides run equal shapes in fp32: `answers.measurable`, a model of 58 million decoder parameters with a small CLIP
tower. Rows that are trained on or read whole have one image's unit and 130 tokens of text. Answers are 64 tokens to 33
tokens of text. Each side has a process of its own and they take turns, so that neither's threads count as the other's
and a change of the machine's speed affects both.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vocojax.config import ModelConfig, config_to_dict, preset
from vocojax.costs import torch_peer
from vocojax.costs.answers import NO_END, measurable
from vocojax.costs.rows import LetterTokenizer
from vocojax.data.packing import Item, RowShape, pack_row
from vocojax.inference.compress import run_units
from vocojax.inference.decoding.decode import Prompts, first_token, more_tokens
from vocojax.inference.decoding.sampling import SamplingConfig, SamplingInputs, SamplingStatics
from vocojax.inference.prompts import whole_prompts, whole_rows
from vocojax.layout import SampleLayout, Span, lay_out_sample, lay_out_unit, unit_shape
from vocojax.models.parameters import parameters_of
from vocojax.models.voco import Rows, VocoLlama
from vocojax.parallel.mesh import make_mesh, shard_batch
from vocojax.training.config import StageConfig, stage_config
from vocojax.training.program import make_model, make_program
from vocojax.training.step import TrainState

Side = Literal["vocojax", "torch"]
SIDES: tuple[Side, ...] = ("vocojax", "torch")
BATCH, TEXT, ANSWER = 2, 130, 60  # rows of a training step, tokens of text of a row, targets of them
QUESTION, NEW_TOKENS = 33, 64  # tokens of a question and of its answer
IMAGES = {"compression of 1 image": 1, "compression of 8 images": 8}
ANSWERS = {"decoding of 1 answer": 1, "decoding of 32 answers": 32}
# Most CPU seconds, as a share of torch's.
GOALS = {"training step": 0.70, "prefill": 0.65, **dict.fromkeys(IMAGES, 0.65), **dict.fromkeys(ANSWERS, 0.70)}

_parts: Mapping[str, Callable[[], Any]] = {}  # of this process's side


def step_report(repeats: int, model: ModelConfig | None = None) -> dict[str, Any]:
    """Measures both sides in turns.

    Args:
      repeats: rounds after the first, which compiles and warms up.
      model: None for `measurable` of the 7B.

    Returns:
      By part: `{"vocojax": {"cpu_seconds", "seconds"}, "torch": {...}, "ratio": of the CPU seconds}`, all medians.

    Raises:
      MissingPackage: PyTorch is not installed.
    """
    torch_peer.require_torch()
    model = measurable(preset("clip_l_336_vicuna_7b")) if model is None else model
    taken: dict[tuple[str, Side], list[tuple[float, float]]] = {(part, side): [] for part in GOALS for side in SIDES}
    context = multiprocessing.get_context("spawn")
    pools = {side: ProcessPoolExecutor(1, context, initializer=_start, initargs=(side, model)) for side in SIDES}
    try:
        for repeat in range(-1, repeats):
            for part, side in taken:
                times = pools[side].submit(_time, part).result()
                if repeat >= 0:
                    taken[part, side].append(times)
    finally:
        for pool in pools.values():
            pool.shutdown()
    report: dict[str, Any] = {}
    for part in GOALS:
        medians = {side: [statistics.median(column) for column in zip(*taken[part, side], strict=True)]
                   for side in SIDES}
        report[part] = {side: {"cpu_seconds": cpu, "seconds": wall} for side, (cpu, wall) in medians.items()}
        report[part]["ratio"] = medians["vocojax"][0] / medians["torch"][0]
    return report


def _start(side: Side, model: ModelConfig) -> None:
    """Prepares a side's process."""
    global _parts
    # PyTorch's OpenMP threads would spin while they wait for each other. On a machine with other work these spins are
    # most of its CPU seconds. OpenMP reads this when PyTorch is loaded.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    _parts = own_parts(model) if side == "vocojax" else peer_parts(model)


def _time(part: str) -> tuple[float, float]:
    """Runs a part once. Returns its CPU seconds and its seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(_parts[part]())
    return time.process_time() - cpu, time.perf_counter() - wall


def own_parts(config: ModelConfig) -> dict[str, Callable[[], Any]]:
    """Returns vocojax's parts as functions without arguments."""
    model = VocoLlama(config, nnx.Rngs(0), jnp.float32)
    prompt = whole_prompts([_sample(config)], [[_image(config)]], config, "voco", len(_sample(config)))

    def compression(count: int) -> Callable[[], Any]:
        rows = jax.tree.map(jnp.asarray, _unit_rows(config, count))
        return lambda: run_units(model, rows, config.unit_vocos)

    return {
        "training step": _training_step(config),
        "prefill": _answers(model, prompt, 1),
        **{part: compression(count) for part, count in IMAGES.items()},
        **{part: _answers(model, _questions(config, count), NEW_TOKENS) for part, count in ANSWERS.items()},
    }


def _answers(model: VocoLlama, prompts: Prompts, new_tokens: int) -> Callable[[], Any]:
    """Returns a function that answers the prompts and returns the new tokens; of a single one, its logits."""
    prompts = jax.tree.map(jnp.asarray, prompts)
    samplings = [SamplingConfig(max_new_tokens=new_tokens)] * len(prompts.lengths_B)
    statics, inputs = SamplingStatics.of(samplings), SamplingInputs.of(samplings)

    def answers() -> Any:
        logits_BV, progress = first_token(model, prompts, None, inputs, end_id=NO_END, statics=statics)
        if new_tokens == 1:
            return logits_BV
        return more_tokens(model, progress, inputs, np.int32(new_tokens), end_id=NO_END, statics=statics).ids_BT

    return answers


def _training_step(config: ModelConfig) -> Callable[[], Any]:
    stage = _stage(config)
    mesh = make_mesh(stage.mesh, jax.devices()[:1])
    program = make_program(stage, mesh)
    parameters = parameters_of(make_model(stage, nnx.Rngs(0)))
    trained, frozen = ({name: parameters[name] for name in names} for names in
                       (program.abstract_state.trained, program.abstract_state.frozen))
    state = TrainState(jnp.int32(0), trained, frozen, program.optimizer.init(trained), {})
    # Placed as the program leaves its results, so that the second step compiles nothing.
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))
    batch = shard_batch(_batch(config), mesh)

    def step() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.step(state, batch)
        return state.trained, metrics

    return step


def _stage(config: ModelConfig) -> StageConfig:
    return stage_config({
        "name": "step", "model": config_to_dict(config), "batch_size": BATCH, "steps": 1000, "remat": "none",
        "data": {"tokenizer": "-", "path": "-", "image_root": "-", "row_length": len(_sample(config)),
                 "images_per_row": 1},
        "learning_rates": [("vision/.*", "freeze"), (".*", 1.0)], "dtype": "float32", "frozen_dtype": "float32",
    })


def peer_parts(config: ModelConfig) -> dict[str, Callable[[], Any]]:
    """Returns the same parts of the peer."""
    sample, images = _sample(config), [_image(config)]
    rows = whole_rows([sample] * BATCH, [images] * BATCH, config, "voco", len(sample))
    labels_BS = np.tile(sample.labels, (BATCH, 1))
    prompt = whole_rows([sample], [images], config, "voco", len(sample))
    units = {part: _unit_rows(config, count) for part, count in IMAGES.items()}
    questions = {part: _questions(config, count).rows for part, count in ANSWERS.items()}
    inputs = torch_peer.Inputs(rows, labels_BS, prompt, units, questions)
    return torch_peer.parts(config, inputs, config.unit_vocos, NEW_TOKENS)


def _batch(config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns a batch of equal rows."""
    sample = _sample(config)
    shape = RowShape(len(sample), 1, len(sample), config.vision.image_size, config.unit_tokens, (("", "voco"),))
    row = pack_row([Item(sample, (_image(config),))], shape)
    return {name: np.stack([array] * BATCH) for name, array in row.items()}


def _sample(config: ModelConfig) -> SampleLayout:
    """Returns one image and `TEXT` tokens of text, the newline before them included."""
    spans = [Span("a" * (TEXT - 1 - ANSWER)), Span("a" * ANSWER, is_target=True)]
    return lay_out_sample("a row", 1, [spans], LetterTokenizer(config.voco.token_id), unit_shape(config), 10**6)


def _unit_rows(config: ModelConfig, count: int) -> Rows:
    """Returns so many rows of one image's unit each."""
    unit = lay_out_unit("unit", LetterTokenizer(config.voco.token_id), unit_shape(config))
    return whole_rows([unit] * count, [[_image(config)]] * count, config, "voco", len(unit))


def _questions(config: ModelConfig, count: int) -> Prompts:
    """Returns so many questions of text alone."""
    spans = [Span("a" * (QUESTION - 1))]
    sample = lay_out_sample("a question", 0, [spans], LetterTokenizer(config.voco.token_id), unit_shape(config), 10**6)
    assert len(sample) == QUESTION
    return whole_prompts([sample] * count, [[]] * count, config, "causal", QUESTION)


def _image(config: ModelConfig) -> np.ndarray:
    size = config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)


def format_report(report: Mapping[str, Any]) -> str:
    """Returns the report as a table for a terminal."""
    lines = [f"{'':24}{'vocojax CPU s':>15}{'torch CPU s':>13}{'ratio':>8}{'goal':>8}{'vocojax s':>12}{'torch s':>10}"]
    for part, figures in report.items():
        ours, theirs = figures["vocojax"], figures["torch"]
        lines.append(f"{part:24}{ours['cpu_seconds']:15.3f}{theirs['cpu_seconds']:13.3f}{figures['ratio']:8.2f}"
                     f"{GOALS[part]:8.2f}{ours['seconds']:12.3f}{theirs['seconds']:10.3f}")
    return "\n".join(lines)
