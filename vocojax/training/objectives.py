"""Objectives: cross-entropy at targets, and the KL divergence to a teacher of paper Eq. 1.

Only target positions are gathered before the final norm and the head, and they go through the head in chunks of a few
slots of every row, so that an array [B, S, V] never exists and rows stay on the devices they are on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.layout import IGNORE
from vocojax.models.llama import Decoder

CHUNK = 1024  # target slots that pass through the head at once, those of all rows together


class TargetSums(NamedTuple):
    """Sums over targets, fp32 scalars: the loss (cross-entropy + weight x KL; nothing else has a gradient),
    cross-entropy and KL in nats, correct greedy tokens, and the number of targets."""

    loss: jax.Array
    cross_entropy: jax.Array
    kl: jax.Array
    correct: jax.Array
    num_targets: jax.Array


class Teacher(NamedTuple):
    """A frozen teacher's decoder, its hidden states for the same tokens, the temperature of the KL and its weight."""

    decoder: Decoder
    hidden_BSE: jax.Array
    temperature: float
    weight: float


def gather_targets(hidden_BSE: jax.Array, target_index_BT: jax.Array) -> jax.Array:
    """Hidden states [B, T, E] that predict the targets."""
    return jnp.take_along_axis(hidden_BSE, target_index_BT[..., None], axis=1)


@jax.named_scope("head")
def target_sums(
    decoder: Decoder,
    hidden_BSE: jax.Array,
    target_index_BT: jax.Array,
    target_ids_BT: jax.Array,
    teacher: Teacher | None = None,
) -> TargetSums:
    """Sums the objectives over the targets of a batch; slots whose id is `IGNORE` count nothing.

    Where a gradient is wanted, every chunk computes its own right behind its loss, so that logits are made once and the
    head is done with before the decoder's backward pass begins.

    Args:
      decoder: owner of the final norm and the head.
      hidden_BSE: its hidden states before the final norm.
      target_index_BT: int32, where the state stands that predicts each target.
      target_ids_BT: int32, the targets or `IGNORE`.
      teacher: for the KL; without one it is 0. It gets no gradient.
    """
    graphdef, *(reader, blocks) = nnx.split(decoder, nnx.Not(nnx.PathContains("blocks")), ...)
    states_NBCE = _chunks(gather_targets(hidden_BSE, target_index_BT), 0)
    guides_NBCE = None if teacher is None else _chunks(gather_targets(teacher.hidden_BSE, target_index_BT), 0)
    given = _chunks(target_ids_BT, IGNORE), guides_NBCE
    nothing = jnp.float32(0)
    zero = TargetSums(nothing, nothing, nothing, nothing, jnp.int32(0))

    def chunk_sums(reader: nnx.State, states_BCE: jax.Array, given: Any) -> TargetSums:
        ids_BC, guides_BCE = given
        return _chunk_sums(nnx.merge(graphdef, reader, blocks), states_BCE, ids_BC, guides_BCE, teacher)

    @jax.custom_vjp
    def sums(reader: nnx.State, states_NBCE: jax.Array, given: Any) -> TargetSums:
        add = lambda total, chunk: (jax.tree.map(jnp.add, total, chunk_sums(reader, chunk[0], chunk[1])), None)
        return jax.lax.scan(add, zero, (states_NBCE, given))[0]

    def with_gradients(reader: nnx.State, states_NBCE: jax.Array, given: Any) -> tuple[TargetSums, Any]:
        def add(total: Any, chunk: Any) -> tuple[Any, jax.Array]:
            loss = lambda reader, states_BCE: ((out := chunk_sums(reader, states_BCE, chunk[1])).loss, out)
            (reader_grad, states_grad), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(reader, chunk[0])
            return jax.tree.map(jnp.add, total, (out, reader_grad)), states_grad

        zeros = jax.tree.map(jnp.zeros_like, reader)
        (total, reader_grad), states_grad = jax.lax.scan(add, (zero, zeros), (states_NBCE, given))
        return total, (reader_grad, states_grad)

    def backward(grads: Any, of_sums: TargetSums) -> tuple[nnx.State, jax.Array, None]:
        reader_grad, states_grad = jax.tree.map(lambda grad: (grad * of_sums.loss).astype(grad.dtype), grads)
        return reader_grad, states_grad, None

    sums.defvjp(with_gradients, backward)
    return sums(reader, states_NBCE, given)


def _chunks(x_BT: jax.Array, fill: int) -> jax.Array:
    """[B, T, ...] -> [N, B, C, ...]: N chunks of C slots of every row, `fill` behind the last."""
    rows, slots = x_BT.shape[:2]
    chunk = min(max(CHUNK // rows, 1), slots)
    padding = [(0, 0), (0, -slots % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
    padded = jnp.pad(x_BT, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(rows, -1, chunk, *x_BT.shape[2:]), 1, 0)


def _chunk_sums(
    decoder: Decoder, states_BCE: jax.Array, ids_BC: jax.Array, guides_BCE: jax.Array | None, teacher: Teacher | None
) -> TargetSums:
    logits_BCV = decoder.logits(states_BCE)
    valid_BC = ids_BC != IGNORE
    # A comparison picks the target's logit: a gather's gradient would be a scatter into an array like the logits.
    is_target_BCV = ids_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    picked_BC = jnp.where(is_target_BCV, logits_BCV, 0.0).sum(-1)
    total = lambda x_BC: jnp.where(valid_BC, x_BC, 0.0).sum()
    loss = cross_entropy = total(jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC)
    kl = jnp.float32(0)
    if teacher is not None and guides_BCE is not None:
        kl = total(_kl(teacher.decoder.logits(guides_BCE), logits_BCV, teacher.temperature))
        loss = cross_entropy + teacher.weight * kl
    return TargetSums(loss, cross_entropy, kl, total(logits_BCV.argmax(-1) == ids_BC), valid_BC.sum())


def _kl(teacher_logits: jax.Array, student_logits: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) per row of logits, scaled by temperature**2 to keep the gradient's size."""
    teacher_log = jax.nn.log_softmax(teacher_logits / temperature)
    student_log = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * (jnp.exp(teacher_log) * (teacher_log - student_log)).sum(-1)
