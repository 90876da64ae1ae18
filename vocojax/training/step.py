"""The training state and one optimizer step over a batch of packed rows."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vocojax.layout import IGNORE
from vocojax.models.gathering import gathered, scatter_gradients_first
from vocojax.models.parameters import Parameters, with_parameters
from vocojax.models.voco import VocoLlama, rows_from_batch
from vocojax.training.config import StageConfig
from vocojax.training.objectives import TargetSums, Teacher, target_sums

Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """Everything a step changes or reads.

    step: int32 scalar, optimizer steps taken. trained: fp32 masters. frozen: the other parameters; no gradient and no
    optimizer state exist for them. optimizer: optax's state. teacher: the teacher's parameters, or empty.
    """

    step: jax.Array
    trained: Parameters
    frozen: Parameters
    optimizer: optax.OptState
    teacher: Parameters


Gradient = Callable[[Parameters, TrainState, Batch], tuple[Parameters, TargetSums]]
Objective = Callable[[Parameters, TrainState, Batch], tuple[jax.Array, TargetSums]]
Evaluate = Callable[[TrainState, Batch], TargetSums]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_objective(model: VocoLlama, teacher: VocoLlama | None, config: StageConfig) -> Objective:
    """The function (trained, state, batch) -> (what is minimised, summed over targets; the sums it is made of)."""

    def sums(trained: Parameters, state: TrainState, batch: Batch) -> tuple[jax.Array, TargetSums]:
        student = with_parameters(model, {**trained, **state.frozen})
        run = lambda m, view: m(rows_from_batch(batch, view), attention=config.attention, remat=config.remat)[0]
        guide = None
        if teacher is not None:
            guiding = gathered(with_parameters(teacher, state.teacher), stacked=False)
            hidden = jax.lax.stop_gradient(run(guiding, "teacher_"))
            guide = Teacher(guiding.decoder, hidden, config.distill.temperature, config.distill.weight)
        hidden_BSE = run(gathered(student, stacked=False), "")
        decoder, hidden_BSE = scatter_gradients_first(student.decoder, hidden_BSE)
        head = gathered(decoder, stacked=False)
        out = target_sums(head, hidden_BSE, batch["target_index"], batch["target_ids"], guide)
        return out.loss, out

    return sums


def make_step(
    model: VocoLlama,
    teacher: VocoLlama | None,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    spread: Callable[[Gradient], Gradient] = lambda gradient: gradient,
) -> Step:
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      model, teacher: abstract models; the state holds their parameters.
      spread: makes of a gradient function one for rows on many devices.

    Metrics are fp32 scalars: loss, cross_entropy, kl (mean nats per target), accuracy (greedy, per target),
    grad_norm (before clipping), targets, tokens.
    """
    objective = make_objective(model, teacher, config)
    gradient = spread(functools.partial(_accumulate, jax.grad(objective, has_aux=True), config.accumulate))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        count = jnp.maximum((batch["target_ids"] != IGNORE).sum(), 1).astype(jnp.float32)
        grads, totals = gradient(state.trained, state, batch)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda g: g / count, grads)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": totals.loss / count,
            "cross_entropy": totals.cross_entropy / count,
            "kl": totals.kl / count,
            "accuracy": totals.correct / count,
            "grad_norm": optax.tree.norm(grads),
            "targets": count,
            "tokens": batch["num_tokens"].sum().astype(jnp.float32),
        }
        return state._replace(step=state.step + 1, trained=trained, optimizer=optimizer_state), metrics

    return step


def make_evaluation(
    model: VocoLlama,
    teacher: VocoLlama | None,
    config: StageConfig,
    spread: Callable[[Gradient], Gradient] = lambda gradient: gradient,
) -> Evaluate:
    """The function (state, batch) -> sums over the batch's targets; arguments as of `make_step`."""
    objective = make_objective(model, teacher, config)
    without_gradient: Gradient = lambda trained, state, batch: ({}, objective(trained, state, batch)[1])
    spread_out = spread(functools.partial(_accumulate, without_gradient, config.accumulate))

    def evaluate(state: TrainState, batch: Batch) -> TargetSums:
        fixed = state._replace(trained={}, frozen={**state.trained, **state.frozen})  # nothing has a gradient
        return spread_out({}, fixed, batch)[1]

    return evaluate


def _accumulate(
    gradient: Gradient, parts: int, trained: Parameters, state: TrainState, batch: Batch
) -> tuple[Parameters, TargetSums]:
    """Sums of gradients and objectives over the parts of a batch, which run one after the other."""
    if parts == 1:
        return gradient(trained, state, batch)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), dict(batch))
    first = jax.tree.map(lambda x: x[0], split)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trained, state, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(trained, state, part)), None)
    return jax.lax.scan(add, zero, split)[0]
