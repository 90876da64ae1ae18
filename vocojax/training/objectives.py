"""Objectives: cross-entropy at targets, and the KL divergence to a teacher of paper Eq. 1.

Only target positions are gathered before the final norm and the head, and they go through the head in chunks of a few
slots of every row, so that an array [B, S, V] never exists and rows stay on the devices they are on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vocojax.layout import IGNORE
from vocojax.models.llama import Decoder

CHUNK = 1024  # target slots that pass through the head at once, those of all rows together


class TargetSums(NamedTuple):
    """Sums over targets, fp32 scalars: cross-entropy and KL in nats, correct greedy tokens, and their number."""

    cross_entropy: jax.Array
    kl: jax.Array
    correct: jax.Array
    num_targets: jax.Array


class Teacher(NamedTuple):
    """A frozen teacher's decoder and its hidden states for the same tokens."""

    decoder: Decoder
    hidden_BSE: jax.Array
    temperature: float


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

    Args:
      decoder: owner of the final norm and the head.
      hidden_BSE: its hidden states before the final norm.
      target_index_BT: int32, where the state stands that predicts each target.
      target_ids_BT: int32, the targets or `IGNORE`.
      teacher: for the KL; without one it is 0.
    """
    states_BTE = [gather_targets(hidden_BSE, target_index_BT)]
    if teacher is not None:
        states_BTE.append(jax.lax.stop_gradient(gather_targets(teacher.hidden_BSE, target_index_BT)))

    def chunk_sums(ids_BC: jax.Array, *states_BCE: jax.Array) -> TargetSums:
        logits_BCV = decoder.logits(states_BCE[0])
        valid_BC = ids_BC != IGNORE
        # A comparison picks the target's logit: a gather's gradient would be a scatter into an array like the logits.
        is_target_BCV = ids_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
        picked_BC = jnp.where(is_target_BCV, logits_BCV, 0.0).sum(-1)
        cross_entropy_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC
        kl_BC = jnp.zeros_like(picked_BC)
        if teacher is not None:
            kl_BC = _kl(teacher.decoder.logits(states_BCE[1]), logits_BCV, teacher.temperature)
        total = lambda x_BC: jnp.where(valid_BC, x_BC, 0.0).sum()
        hits_BC = logits_BCV.argmax(-1) == ids_BC
        return TargetSums(total(cross_entropy_BC), total(kl_BC), total(hits_BC), valid_BC.sum())

    rows, slots = target_ids_BT.shape
    chunk = max(CHUNK // rows, 1)
    if slots <= chunk:
        return chunk_sums(target_ids_BT, *states_BTE)

    def chunked(x_BT: jax.Array, fill: int) -> jax.Array:
        padding = [(0, 0), (0, -slots % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
        padded = jnp.pad(x_BT, padding, constant_values=fill)
        return jnp.moveaxis(padded.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:]), 1, 0)

    body = jax.checkpoint(lambda carry, xs: (jax.tree.map(jnp.add, carry, chunk_sums(*xs)), None), prevent_cse=False)
    zero = TargetSums(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.int32(0))
    return jax.lax.scan(body, zero, (chunked(target_ids_BT, IGNORE), *(chunked(x, 0) for x in states_BTE)))[0]


def _kl(teacher_logits: jax.Array, student_logits: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) per row of logits, scaled by temperature**2 to keep the gradient's size."""
    teacher_log = jax.nn.log_softmax(teacher_logits / temperature)
    student_log = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * (jnp.exp(teacher_log) * (teacher_log - student_log)).sum(-1)
