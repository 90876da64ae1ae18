"""Objectives: cross-entropy at targets, and the KL divergence to a teacher of paper Eq. 1.

Only target positions are gathered before the final norm and the head, and they go through the head in chunks, so
that an array [B, S, V] never exists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vocojax.layout import IGNORE
from vocojax.models.llama import Decoder

CHUNK = 1024  # targets that pass through the head at once


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
    """Hidden states [B*T, E] that predict the targets."""
    gathered_BTE = jnp.take_along_axis(hidden_BSE, target_index_BT[..., None], axis=1)
    return gathered_BTE.reshape(-1, gathered_BTE.shape[-1])


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
    ids_N = target_ids_BT.reshape(-1)
    states = [gather_targets(hidden_BSE, target_index_BT)]
    if teacher is not None:
        states.append(jax.lax.stop_gradient(gather_targets(teacher.hidden_BSE, target_index_BT)))

    def chunk_sums(ids_C: jax.Array, *states_CE: jax.Array) -> TargetSums:
        logits_CV = decoder.logits(states_CE[0])
        valid_C = ids_C != IGNORE
        log_probs_CV = jax.nn.log_softmax(logits_CV)
        picked_C = jnp.take_along_axis(log_probs_CV, jnp.where(valid_C, ids_C, 0)[:, None], axis=1)[:, 0]
        kl_C = jnp.zeros_like(picked_C)
        if teacher is not None:
            kl_C = _kl(teacher.decoder.logits(states_CE[1]), logits_CV, teacher.temperature)
        total = lambda x_C: jnp.where(valid_C, x_C, 0.0).sum()
        return TargetSums(total(-picked_C), total(kl_C), total(logits_CV.argmax(-1) == ids_C), valid_C.sum())

    if len(ids_N) <= CHUNK:
        return chunk_sums(ids_N, *states)
    padding = -len(ids_N) % CHUNK
    chunked = lambda x, fill: jnp.concatenate([x, jnp.full((padding, *x.shape[1:]), fill, x.dtype)]).reshape(
        -1, CHUNK, *x.shape[1:]
    )
    body = jax.checkpoint(lambda carry, xs: (jax.tree.map(jnp.add, carry, chunk_sums(*xs)), None), prevent_cse=False)
    zero = TargetSums(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.int32(0))
    return jax.lax.scan(body, zero, (chunked(ids_N, IGNORE), *(chunked(s, 0) for s in states)))[0]


def _kl(teacher_logits: jax.Array, student_logits: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) per row of logits, scaled by temperature**2 to keep the gradient's size."""
    teacher_log = jax.nn.log_softmax(teacher_logits / temperature)
    student_log = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * (jnp.exp(teacher_log) * (teacher_log - student_log)).sum(-1)
