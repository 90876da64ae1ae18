"""Objectives: cross-entropy at targets, and the KL divergence to a teacher (paper Eq. 1).

Only target positions are gathered before the final norm and the head: first the slots of all rows that hold a target,
then the others. They go through the head chunk after chunk, so that an array [B, S, V] never exists, and only as far as
there are targets. Most slots are empty: a row of 2,048 slots has about 500 targets.

A gradient is computed in the forward pass, each chunk's right after its loss (`_sums_and_gradients`). So logits are
made once, and the head is done before the backward pass of the decoder begins.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.kernels.sharding import device_kind
from vocojax.layout import IGNORE
from vocojax.models.llama import Decoder

Total = TypeVar("Total")

CHUNK = 1024  # target slots that pass through the head at once, those of all rows together
CPU_CHUNK = 256  # the same on a CPU, which is as fast with few and has few targets; its slots are not spread so thin


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
    """Values that are known when the program is traced.

    Attributes:
      axes: mesh axes of the devices that run as many chunks as the one that needs most.
    """

    decoder: nnx.GraphDef
    teacher: nnx.GraphDef | None
    temperature: float
    weight: float
    axes: tuple[str, ...]


class _Frozen(NamedTuple):
    """Parameters without a gradient here: the decoder's blocks, which the head does not use, and the teacher's."""

    blocks: nnx.State
    teacher: nnx.State | None


class _Targets(NamedTuple):
    """Targets in X chunks of C slots, of which the first ones are filled.

    Attributes:
      ids_XC: int32, token ids or `IGNORE`.
      guides_XCE: the teacher's hidden states that predict them, or None.
    """

    ids_XC: jax.Array
    guides_XCE: jax.Array | None

    def filled(self, axes: tuple[str, ...]) -> jax.Array:
        """Returns the number of chunks with a target, on the device of `axes` that has most."""
        count = (self.ids_XC != IGNORE).any(1).sum()
        return jax.lax.pmax(count, axes) if axes else count


class _Slots(NamedTuple):
    """The target slots of all rows, those with a target first.

    Attributes:
      state_A: int32, the place of each slot's state among those of all rows.
      ids_A: int32, its target or `IGNORE`.
    """

    state_A: jax.Array
    ids_A: jax.Array

    @classmethod
    def of(cls, target_index_BT: jax.Array, target_ids_BT: jax.Array, length: int) -> "_Slots":
        """Returns the slots of rows, given their number of states."""
        rows_B1 = jnp.arange(len(target_ids_BT), dtype=jnp.int32)[:, None]
        ids_A = target_ids_BT.reshape(-1)
        order_A = jnp.argsort(ids_A == IGNORE, stable=True)
        return cls((rows_B1 * length + target_index_BT).reshape(-1)[order_A], ids_A[order_A])

    def gather(self, hidden_BSE: jax.Array) -> jax.Array:
        """Returns the states [A, E] that predict the targets."""
        return hidden_BSE.reshape(-1, hidden_BSE.shape[-1])[self.state_A]


def chunk_slots() -> int:
    """Returns the most slots that pass through the head at once, on the devices that the program is built for."""
    return CPU_CHUNK if device_kind() == "cpu" else CHUNK


@jax.named_scope("head")
def target_sums(
    decoder: Decoder,
    hidden_BSE: jax.Array,
    target_index_BT: jax.Array,
    target_ids_BT: jax.Array,
    teacher: Teacher | None = None,
    axes: tuple[str, ...] = (),
) -> TargetSums:
    """Sums the objectives over the targets of a batch; slots whose id is `IGNORE` count nothing.

    The time is that of the chunks that the targets of all rows fill.

    Args:
      decoder: owner of the final norm and the head.
      hidden_BSE: its hidden states before the final norm.
      target_index_BT: int32, the position of the state that predicts each target.
      target_ids_BT: int32, the targets or `IGNORE`.
      teacher: for the KL; without one it is 0. It gets no gradient.
      axes: the mesh axes that rows are split over in a `jax.shard_map`. All devices run the same number of chunks,
        because axis `tensor` may communicate in each of them.
    """
    graphdef, *(head, blocks) = nnx.split(decoder, nnx.Not(nnx.PathContains("blocks")), ...)
    slots = _Slots.of(target_index_BT, target_ids_BT, hidden_BSE.shape[1])
    states_XCE, ids_XC = _chunks(slots.gather(hidden_BSE), 0), _chunks(slots.ids_A, IGNORE)
    if teacher is None:
        statics, frozen, guides_XCE = _Statics(graphdef, None, 1.0, 0.0, axes), _Frozen(blocks, None), None
    else:
        teacher_graphdef, teacher_state = nnx.split(teacher.decoder)
        statics = _Statics(graphdef, teacher_graphdef, teacher.temperature, teacher.weight, axes)
        frozen = _Frozen(blocks, teacher_state)
        guides_XCE = _chunks(slots.gather(teacher.hidden_BSE), 0)
    return _sums(statics, head, states_XCE, frozen, _Targets(ids_XC, guides_XCE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    statics: _Statics, head: nnx.State, states_XCE: jax.Array, frozen: _Frozen, targets: _Targets
) -> TargetSums:
    """Returns the sums over all chunks; has gradients for the head and the states."""

    def add_chunk(n: Any, total: TargetSums) -> TargetSums:
        return _plus(total, _chunk_sums(head, states_XCE[n], statics, frozen, _chunk(targets, n)))

    return _for_filled_chunks(statics, targets, add_chunk, _no_sums())


def _sums_and_gradients(
    statics: _Statics, head: nnx.State, states_XCE: jax.Array, frozen: _Frozen, targets: _Targets
) -> tuple[TargetSums, tuple[nnx.State, jax.Array]]:
    """Returns the sums, and the gradients of their loss by head and states."""
    gradients = jax.grad(_chunk_loss, argnums=(0, 1), has_aux=True)

    def add_chunk(n: Any, total: Any) -> Any:
        sums, head_grad, states_grad_XCE = total
        (more, states_grad_CE), chunk_sums = gradients(head, states_XCE[n], statics, frozen, _chunk(targets, n))
        return _plus(sums, chunk_sums), _plus(head_grad, more), states_grad_XCE.at[n].set(states_grad_CE)

    nothing = _no_sums(), jax.tree.map(jnp.zeros_like, head), jnp.zeros_like(states_XCE)
    sums, head_grad, states_grad_XCE = _for_filled_chunks(statics, targets, add_chunk, nothing)
    return sums, (head_grad, states_grad_XCE)


def _for_filled_chunks(
    statics: _Statics, targets: _Targets, add_chunk: Callable[[Any, Any], Any], nothing: Total
) -> Total:
    """Returns what `add_chunk(number, total)` makes of `nothing`, chunk after chunk. A single chunk needs no loop."""
    if len(targets.ids_XC) == 1:
        return add_chunk(0, nothing)
    return jax.lax.fori_loop(0, targets.filled(statics.axes), add_chunk, nothing)


def _chunk(targets: _Targets, n: Any) -> _Targets:
    """Returns the targets of one chunk, without the axis X."""
    return jax.tree.map(lambda x_XC: x_XC[n], targets)


def _scale_gradients(
    statics: _Statics, gradients: tuple[nnx.State, jax.Array], of_sums: TargetSums
) -> tuple[nnx.State, jax.Array, None, None]:
    """Returns the gradients of `_sums`' arguments, by the chain rule: those of its loss times the loss's own."""
    head_grad, states_grad = jax.tree.map(lambda grad: (grad * of_sums.loss).astype(grad.dtype), gradients)
    return head_grad, states_grad, None, None


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _chunks(x_A: jax.Array, fill: int) -> jax.Array:
    """Returns X even chunks [X, C, ...] of the slots of [A, ...], with `fill` after the last slot."""
    count = -(-len(x_A) // chunk_slots())
    padding = [(0, -len(x_A) % count)] + [(0, 0)] * (x_A.ndim - 1)
    padded = jnp.pad(x_A, padding, constant_values=fill)
    return padded.reshape(count, -1, *x_A.shape[1:])


def _no_sums() -> TargetSums:
    nothing = jnp.float32(0)
    return TargetSums(nothing, nothing, nothing, nothing, jnp.int32(0))


def _plus(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _chunk_loss(
    head: nnx.State, states_CE: jax.Array, statics: _Statics, frozen: _Frozen, targets: _Targets
) -> tuple[jax.Array, TargetSums]:
    """Returns what has a gradient, and all sums."""
    sums = _chunk_sums(head, states_CE, statics, frozen, targets)
    return sums.loss, sums


def _chunk_sums(
    head: nnx.State, states_CE: jax.Array, statics: _Statics, frozen: _Frozen, targets: _Targets
) -> TargetSums:
    """Returns the sums over one chunk: `targets` are those of the chunk, without the axis X."""
    ids_C, guides_CE = targets
    logits_CV = nnx.merge(statics.decoder, head, frozen.blocks).logits(states_CE)
    valid_C = ids_C != IGNORE
    # A comparison picks the target's logit: a gather's gradient would be a scatter into an array like the logits.
    is_target_CV = ids_C[..., None] == jnp.arange(logits_CV.shape[-1])
    picked_C = jnp.where(is_target_CV, logits_CV, 0.0).sum(-1)
    total = lambda x_C: jnp.where(valid_C, x_C, 0.0).sum()
    loss = cross_entropy = total(jax.nn.logsumexp(logits_CV, axis=-1) - picked_C)
    kl = jnp.float32(0)
    if statics.teacher is not None:
        teacher_logits_CV = nnx.merge(statics.teacher, frozen.teacher).logits(guides_CE)
        kl = total(_kl(teacher_logits_CV, logits_CV, statics.temperature))
        loss = cross_entropy + statics.weight * kl
    return TargetSums(loss, cross_entropy, kl, total(logits_CV.argmax(-1) == ids_C), valid_C.sum())


def _kl(teacher_logits: jax.Array, student_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns KL(teacher || student) per row of logits, times temperature**2 to keep the gradient's size."""
    teacher_log = jax.nn.log_softmax(teacher_logits / temperature)
    student_log = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * (jnp.exp(teacher_log) * (teacher_log - student_log)).sum(-1)
