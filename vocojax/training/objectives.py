"""Objectives: cross-entropy at targets, and the KL divergence to a teacher (paper Eq. 1).

Only target positions are gathered before the final norm and the head. They go through the head in chunks of a few slots
of every row, so that an array [B, S, V] never exists and rows stay on the devices they are on.

A gradient is computed in the forward pass, each chunk's right after its loss (`_sums_and_gradients`). So logits are
made once, and the head is done before the backward pass of the decoder begins.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.layout import IGNORE
from vocojax.models.llama import Decoder

CHUNK = 1024  # target slots that pass through the head at once, those of all rows together


class TargetSums(NamedTuple):
    """Sums over targets, fp32 scalars except the last.

    Attributes:
      loss: cross_entropy + weight x kl; nothing else has a gradient.
      cross_entropy: in nats.
      kl: to the teacher, in nats; 0 without one.
      correct: targets that are the most likely token.
      num_targets: int32.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    kl: jax.Array
    correct: jax.Array
    num_targets: jax.Array


class Teacher(NamedTuple):
    """A frozen teacher.

    Attributes:
      decoder: owner of its final norm and head.
      hidden_BSE: its hidden states for the same tokens, before the final norm.
      temperature: of the KL; divides both models' logits.
      weight: of the KL in the loss.
    """

    decoder: Decoder
    hidden_BSE: jax.Array
    temperature: float
    weight: float


class _Statics(NamedTuple):
    """Values that are known when the program is traced."""

    decoder: nnx.GraphDef
    teacher: nnx.GraphDef | None
    temperature: float
    weight: float


class _Frozen(NamedTuple):
    """Parameters without a gradient here: the decoder's blocks, which the head does not use, and the teacher's."""

    blocks: nnx.State
    teacher: nnx.State | None


class _Targets(NamedTuple):
    """Targets in chunks.

    Attributes:
      ids_NBC: int32, token ids or `IGNORE`.
      guides_NBCE: the teacher's hidden states that predict them, or None.
    """

    ids_NBC: jax.Array
    guides_NBCE: jax.Array | None


def gather_targets(hidden_BSE: jax.Array, target_index_BT: jax.Array) -> jax.Array:
    """Returns the hidden states [B, T, E] that predict the targets."""
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

    Args:
      decoder: owner of the final norm and the head.
      hidden_BSE: its hidden states before the final norm.
      target_index_BT: int32, the position of the state that predicts each target.
      target_ids_BT: int32, the targets or `IGNORE`.
      teacher: for the KL; without one it is 0. It gets no gradient.
    """
    graphdef, *(head, blocks) = nnx.split(decoder, nnx.Not(nnx.PathContains("blocks")), ...)
    states_NBCE = _chunks(gather_targets(hidden_BSE, target_index_BT), 0)
    ids_NBC = _chunks(target_ids_BT, IGNORE)
    if teacher is None:
        statics, frozen, guides_NBCE = _Statics(graphdef, None, 1.0, 0.0), _Frozen(blocks, None), None
    else:
        teacher_graphdef, teacher_state = nnx.split(teacher.decoder)
        statics = _Statics(graphdef, teacher_graphdef, teacher.temperature, teacher.weight)
        frozen = _Frozen(blocks, teacher_state)
        guides_NBCE = _chunks(gather_targets(teacher.hidden_BSE, target_index_BT), 0)
    return _sums(statics, head, states_NBCE, frozen, _Targets(ids_NBC, guides_NBCE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    statics: _Statics, head: nnx.State, states_NBCE: jax.Array, frozen: _Frozen, targets: _Targets
) -> TargetSums:
    """Returns the sums over all chunks; has gradients for the head and the states."""

    def add_chunk(total: TargetSums, chunk: tuple[jax.Array, _Targets]) -> tuple[TargetSums, None]:
        states_BCE, chunk_targets = chunk
        return _plus(total, _chunk_sums(head, states_BCE, statics, frozen, chunk_targets)), None

    return jax.lax.scan(add_chunk, _no_sums(), (states_NBCE, targets))[0]


def _sums_and_gradients(
    statics: _Statics, head: nnx.State, states_NBCE: jax.Array, frozen: _Frozen, targets: _Targets
) -> tuple[TargetSums, tuple[nnx.State, jax.Array]]:
    """Returns the sums, and the gradients of their loss by head and states."""
    gradients = jax.grad(_chunk_loss, argnums=(0, 1), has_aux=True)

    def add_chunk(total: Any, chunk: tuple[jax.Array, _Targets]) -> tuple[Any, jax.Array]:
        states_BCE, chunk_targets = chunk
        (head_grad, states_grad), sums = gradients(head, states_BCE, statics, frozen, chunk_targets)
        return _plus(total, (sums, head_grad)), states_grad

    nothing = _no_sums(), jax.tree.map(jnp.zeros_like, head)
    (sums, head_grad), states_grad = jax.lax.scan(add_chunk, nothing, (states_NBCE, targets))
    return sums, (head_grad, states_grad)


def _scale_gradients(
    statics: _Statics, gradients: tuple[nnx.State, jax.Array], of_sums: TargetSums
) -> tuple[nnx.State, jax.Array, None, None]:
    """Returns the gradients of `_sums`' arguments, by the chain rule: those of its loss times the loss's own."""
    head_grad, states_grad = jax.tree.map(lambda grad: (grad * of_sums.loss).astype(grad.dtype), gradients)
    return head_grad, states_grad, None, None


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _chunks(x_BT: jax.Array, fill: int) -> jax.Array:
    """Returns N chunks [N, B, C, ...] of C slots of every row of [B, T, ...], with `fill` after the last slot."""
    rows, slots = x_BT.shape[:2]
    chunk = min(max(CHUNK // rows, 1), slots)
    padding = [(0, 0), (0, -slots % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
    padded = jnp.pad(x_BT, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(rows, -1, chunk, *x_BT.shape[2:]), 1, 0)


def _no_sums() -> TargetSums:
    nothing = jnp.float32(0)
    return TargetSums(nothing, nothing, nothing, nothing, jnp.int32(0))


def _plus(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _chunk_loss(
    head: nnx.State, states_BCE: jax.Array, statics: _Statics, frozen: _Frozen, targets: _Targets
) -> tuple[jax.Array, TargetSums]:
    """Returns what has a gradient, and all sums."""
    sums = _chunk_sums(head, states_BCE, statics, frozen, targets)
    return sums.loss, sums


def _chunk_sums(
    head: nnx.State, states_BCE: jax.Array, statics: _Statics, frozen: _Frozen, targets: _Targets
) -> TargetSums:
    """Returns the sums over one chunk: `targets` are those of the chunk, without the axis N."""
    ids_BC, guides_BCE = targets
    logits_BCV = nnx.merge(statics.decoder, head, frozen.blocks).logits(states_BCE)
    valid_BC = ids_BC != IGNORE
    # A comparison picks the target's logit: a gather's gradient would be a scatter into an array like the logits.
    is_target_BCV = ids_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    picked_BC = jnp.where(is_target_BCV, logits_BCV, 0.0).sum(-1)
    total = lambda x_BC: jnp.where(valid_BC, x_BC, 0.0).sum()
    loss = cross_entropy = total(jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC)
    kl = jnp.float32(0)
    if statics.teacher is not None:
        teacher_logits_BCV = nnx.merge(statics.teacher, frozen.teacher).logits(guides_BCE)
        kl = total(_kl(teacher_logits_BCV, logits_BCV, statics.temperature))
        loss = cross_entropy + statics.weight * kl
    return TargetSums(loss, cross_entropy, kl, total(logits_BCV.argmax(-1) == ids_BC), valid_BC.sum())


def _kl(teacher_logits: jax.Array, student_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns KL(teacher || student) per row of logits, times temperature**2 to keep the gradient's size."""
    teacher_log = jax.nn.log_softmax(teacher_logits / temperature)
    student_log = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * (jnp.exp(teacher_log) * (teacher_log - student_log)).sum(-1)
