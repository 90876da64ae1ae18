"""The training state and one optimizer step over a batch of packed rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vocojax.layout import IGNORE
from vocojax.models.gathering import gathered, scatter_gradients_first
from vocojax.models.parameters import Parameters, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.training.config import StageConfig
from vocojax.training.objectives import TargetSums, Teacher, target_sums
from vocojax.training.optimizer import make_schedule
from vocojax.training.plan import Batch, hidden_states


class TrainState(NamedTuple):
    """Everything that a step changes or reads.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      trained: fp32 masters of the parameters that train, by name.
      frozen: the other parameters; no gradient and no optimizer state exist for them.
      optimizer: optax's state.
      teacher: the teacher's parameters, or empty.
      ema: fp32 moving averages of `trained`, or empty.
    """

    step: jax.Array
    trained: Parameters
    frozen: Parameters
    optimizer: optax.OptState
    teacher: Parameters
    ema: Parameters = {}  # noqa: RUF012 (nobody changes it)

    @property
    def parameters(self) -> Parameters:
        """Every parameter as whoever reads the run gets it: averages, if there are any, in place of what trains."""
        return {**self.trained, **self.ema, **self.frozen}


Gradient = Callable[[Parameters, TrainState, Batch], tuple[Parameters, TargetSums]]
Objective = Callable[[Parameters, TrainState, Batch], tuple[jax.Array, TargetSums]]
Evaluate = Callable[[TrainState, Batch], TargetSums]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_objective(
    model: VocoLlama, teacher: VocoLlama | None, config: StageConfig, axes: tuple[str, ...] = ()
) -> Objective:
    """Returns the function (trained, state, batch) -> (the loss summed over targets, all sums); arguments as of
    `make_step`. The trained parameters are an argument of their own because the gradient is taken by them."""

    def guide(state: TrainState, batch: Batch) -> Teacher | None:
        if teacher is None:
            return None
        whole = gathered(with_parameters(teacher, state.teacher), stacked=False)
        hidden_BSE = jax.lax.stop_gradient(hidden_states(whole, batch, config, "teacher_", axes))
        return Teacher(whole.decoder, hidden_BSE, config.distill.temperature, config.distill.weight)

    def objective(trained: Parameters, state: TrainState, batch: Batch) -> tuple[jax.Array, TargetSums]:
        taught_by = guide(state, batch)
        student = with_parameters(model, {**trained, **state.frozen})
        dropout = jax.random.fold_in(jax.random.key(config.seed), state.step) if config.lora.dropout else None
        hidden_BSE = hidden_states(gathered(student, stacked=False), batch, config, axes=axes, step=state.step,
                                   dropout=dropout)
        decoder, hidden_BSE = scatter_gradients_first(student.decoder, hidden_BSE)
        head = gathered(decoder, stacked=False)
        sums = target_sums(head, hidden_BSE, batch["target_index"], batch["target_ids"], taught_by, axes)
        return sums.loss, sums

    return objective


def make_step(
    model: VocoLlama,
    teacher: VocoLlama | None,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    over_devices: Callable[[Gradient], Gradient] = lambda gradient: gradient,
    axes: tuple[str, ...] = (),
) -> Step:
    """Returns the function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Metrics are fp32 scalars: loss, cross_entropy (mean nats per target), kl (likewise, with a teacher), accuracy
    (greedy, per target), grad_norm (before clipping), update_norm (of the change of all parameters), learning_rate (of
    parameters whose multiplier is 1), targets, tokens.

    Args:
      model: abstract; the state holds its parameters.
      teacher: likewise, or None.
      optimizer: over the flat dict of what trains.
      config: of the stage.
      over_devices: makes of a gradient function one for rows on many devices.
      axes: the mesh axes that rows are split over then.
    """
    objective = make_objective(model, teacher, config, axes)
    rate = make_schedule(config.optimizer, config.steps)
    gradient = over_devices(functools.partial(_accumulate, jax.grad(objective, has_aux=True), config.accumulate))
    is_numbered = config.lora.dropout > 0 or config.closing > 0

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        count = jnp.maximum((batch["target_ids"] != IGNORE).sum(), 1).astype(jnp.float32)
        grads, totals = gradient(state.trained, state, numbered(batch) if is_numbered else batch)
        with jax.named_scope("optimizer"):  # the totals are sums over targets, the gradient is that of their mean
            grads = jax.tree.map(lambda g: g / count, grads)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            update_norm = optax.tree.norm(updates)
            ema = optax.incremental_update(trained, state.ema, 1 - config.optimizer.ema) if state.ema else {}
        metrics = {
            "loss": totals.loss / count,
            "cross_entropy": totals.cross_entropy / count,
            **({} if teacher is None else {"kl": totals.kl / count}),
            "accuracy": totals.correct / count,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": update_norm,
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "targets": count,
            "tokens": batch["num_tokens"].sum().astype(jnp.float32),
        }
        return state._replace(step=state.step + 1, trained=trained, optimizer=optimizer_state, ema=ema), metrics

    return step


def numbered(batch: Batch) -> Batch:
    """Returns a batch with the number of each row among all of its rows, by which dropout and `closing` choose."""
    return {**batch, "row": jnp.arange(len(batch["ids"]), dtype=jnp.int32)}


def make_evaluation(
    model: VocoLlama,
    teacher: VocoLlama | None,
    config: StageConfig,
    over_devices: Callable[[Gradient], Gradient] = lambda gradient: gradient,
    axes: tuple[str, ...] = (),
) -> Evaluate:
    """Returns the function (state, batch) -> sums over the batch's targets; arguments as of `make_step`.

    It measures the averages of the parameters, if there are any. LoRA's dropout and `closing` are only for training.
    """
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0), closing=0.0)
    objective = make_objective(model, teacher, config, axes)

    def no_gradient(trained: Parameters, state: TrainState, batch: Batch) -> tuple[Parameters, TargetSums]:
        return {}, objective(trained, state, batch)[1]

    sums = over_devices(functools.partial(_accumulate, no_gradient, config.accumulate))

    def evaluate(state: TrainState, batch: Batch) -> TargetSums:
        all_frozen = state._replace(step=jnp.zeros_like(state.step), trained={}, frozen=state.parameters, ema={})
        return sums({}, all_frozen, batch)[1]

    return evaluate


def _accumulate(
    gradient: Gradient, parts: int, trained: Parameters, state: TrainState, batch: Batch
) -> tuple[Parameters, TargetSums]:
    """Returns the sums of gradients and objectives over the parts of a batch, which run one after the other.

    Args:
      gradient: of one part.
      parts: how many there are; they divide the rows.
    """
    if parts == 1:
        return gradient(trained, state, batch)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), dict(batch))
    first = jax.tree.map(lambda x: x[0], split)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trained, state, first))

    def add(total: tuple[Parameters, TargetSums], part: Batch) -> tuple[tuple[Parameters, TargetSums], None]:
        return jax.tree.map(jnp.add, total, gradient(trained, state, part)), None

    return jax.lax.scan(add, zero, split)[0]
