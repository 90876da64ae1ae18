"""The second inference stage: text is read, behind a cache or with its images, and answered token by token."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vocojax.config import require, require_positive
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.models.llama import KeyValues
from vocojax.models.voco import Rows, VocoLlama


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen: greedily at temperature 0, else drawn from the `top_p` mass of the tempered softmax."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens")
        require(self.temperature >= 0, "temperature", "must be >= 0", self.temperature)
        require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]", self.top_p)


GREEDY = SamplingConfig()


class Generation(NamedTuple):
    """ids_BT: int32 answers, padded with the end token; logits_BV: fp32 of each row's first token."""

    ids_BT: jax.Array
    logits_BV: jax.Array


class _Progress(NamedTuple):
    step: jax.Array
    ids_BT: jax.Array
    done_B: jax.Array
    cache: KeyValues


@functools.partial(jax.jit, static_argnames=("end_id", "sampling"))
def generate(
    model: VocoLlama,
    rows: Rows,
    lengths_B: jax.Array,
    prefix: KeyValues | None,
    seeds_B: jax.Array,
    *,
    end_id: int,
    sampling: SamplingConfig,
) -> Generation:
    """Answers a batch of prompts in one compiled loop with a static cache.

    Every row's answer depends on that row alone: its own tokens, its own seed.

    Args:
      rows: prompts, whole or text behind `prefix`, padded at the end.
      lengths_B: int32, tokens of each row that are no padding.
      prefix: keys and values that the rows' mask counts as earlier tokens.
      seeds_B: uint32, what each row's draws are seeded with (unused at temperature 0).
      end_id: the token that ends an answer.
    """
    num_rows, length = rows.ids_BS.shape
    first_index = 0 if prefix is None else prefix.length
    hidden_BSE, kept = model(rows, prefix=prefix, keep=length)
    last_B = lengths_B - 1
    pick = lambda x_BS: jnp.take_along_axis(x_BS, last_B[:, None], axis=1)
    logits_BV = next_logits(model, jnp.take_along_axis(hidden_BSE, last_B[:, None, None], axis=1))

    # Cache: prefix, prompt, answer. What the prompt's last token sees, every answer token sees.
    room = jnp.zeros((*kept.k_LBKGD.shape[:2], sampling.max_new_tokens, *kept.k_LBKGD.shape[3:]), kept.k_LBKGD.dtype)
    before = [] if prefix is None else [jax.tree.map(lambda x: x.astype(room.dtype), prefix)]
    join = lambda *parts: jnp.concatenate([*parts, room], axis=2)
    cache = KeyValues(*(join(*parts) for parts in zip(*before, kept, strict=True)))
    keys_K = jnp.arange(cache.length + 1)  # the last is the answer token that is being read
    answers_from = first_index + length
    prompt_K, last_index_B1 = keys_K[:answers_from], first_index + last_B[:, None]
    sees_prompt_BK = (
        (pick(rows.start_BS) <= prompt_K) & (prompt_K <= last_index_B1) & (last_index_B1 < rows.stop_BK)
    )
    first_position_B1 = pick(rows.positions_BS) + 1

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        if sampling.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds_B)
        return jax.vmap(jax.random.categorical)(keys_B, _tempered(logits, sampling)).astype(jnp.int32)

    def advance(progress: _Progress) -> _Progress:
        step, ids_BT, done_B, cache = progress
        read_B1 = jax.lax.dynamic_index_in_dim(ids_BT, step, axis=1)
        is_answer_K = (keys_K >= answers_from) & (keys_K < answers_from + step) | (keys_K == cache.length)
        sees_BK = jnp.pad(sees_prompt_BK, ((0, 0), (0, len(keys_K) - answers_from))) | is_answer_K
        mask = IntervalMask(jnp.zeros((num_rows, 1), jnp.int32), jnp.where(sees_BK, len(keys_K), 0).astype(jnp.int32))
        hidden_B1E, new = model.decoder(
            model.decoder.embed(read_B1, model.dtype), first_position_B1 + step, mask, prefix=cache, keep=1
        )
        write = lambda old, fresh: jax.lax.dynamic_update_slice_in_dim(old, fresh, answers_from + step, axis=2)
        chosen_B = jnp.where(done_B, end_id, choose(next_logits(model, hidden_B1E), step + 1))
        return _Progress(
            step + 1, ids_BT.at[:, step + 1].set(chosen_B), done_B | (chosen_B == end_id),
            jax.tree.map(write, cache, new),
        )

    first_B = choose(logits_BV, jnp.int32(0))
    ids_BT = jnp.full((num_rows, sampling.max_new_tokens), end_id, jnp.int32).at[:, 0].set(first_B)
    start = _Progress(jnp.int32(0), ids_BT, first_B == end_id, cache)
    goes_on = lambda p: (p.step < sampling.max_new_tokens - 1) & ~p.done_B.all()
    return Generation(jax.lax.while_loop(goes_on, advance, start).ids_BT, logits_BV)


def next_logits(model: VocoLlama, hidden_B1E: jax.Array) -> jax.Array:
    """fp32 logits [B, V] of the next token; an answer never contains `<voco>` or the vocabulary's padding."""
    logits_BV = model.decoder.logits(hidden_B1E)[:, 0]
    is_text_V = jnp.arange(logits_BV.shape[-1]) != model.config.voco.token_id
    return jnp.where(is_text_V, logits_BV, -jnp.inf)


def _tempered(logits_BV: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Logits over the temperature, -inf outside the smallest set of tokens that holds `top_p` of the mass."""
    logits_BV = logits_BV / sampling.temperature
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    mass_before_BV = jnp.cumsum(jax.nn.softmax(descending_BV), axis=-1) - jax.nn.softmax(descending_BV)
    kept_BV = jnp.where(mass_before_BV < sampling.top_p, descending_BV, jnp.inf)
    return jnp.where(logits_BV >= kept_BV.min(-1, keepdims=True), logits_BV, -jnp.inf)
