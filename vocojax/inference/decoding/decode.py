"""The second inference stage: text is read, behind a cache or with its images, and answered token by token.

`first_token` reads the prompts and chooses the first token; `more_tokens` is the one compiled loop over a static cache
that chooses the others. It stops wherever the host wants to look (streaming, stop strings) and goes on from there.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.inference.decoding.sampling import Knobs, Plan, SamplingConfig, choose
from vocojax.models.llama import KeyValues, StaticCache
from vocojax.models.voco import Rows, VocoLlama

# How often each program was compiled: a metric of a server, which should stand still once all lengths were met.
COMPILATIONS: collections.Counter[str] = collections.Counter()
LOOK_EVERY = 16  # tokens between looks at the text where strings may end an answer


class Prompts(NamedTuple):
    """Prompts, one to a row.

    rows: the tokens, whole or text behind a prefix, padded at the end.
    lengths_B: int32, tokens of each row that are no padding.
    text_start_B: int32, the first token of each row that is text.
    seeds_B: uint32, what each row's draws are seeded with.
    """

    rows: Rows
    lengths_B: jax.Array
    text_start_B: jax.Array
    seeds_B: jax.Array


class Generation(NamedTuple):
    """ids_BT: int32 answers, padded with the end token; logits_BV: fp32 of each row's first token."""

    ids_BT: jax.Array
    logits_BV: jax.Array


class Progress(NamedTuple):
    """Answers under way.

    step: int32, tokens chosen so far. ids_BT: int32 answers, the end token where none is chosen. done_B: bool.
    held_BV: bool, tokens that the row's text holds ([B, 0] without a penalty). position_B1: int32 of the first answer
    token. stop_BK: int32 mask of the cache's slots. seeds_B: uint32.
    """

    step: jax.Array
    ids_BT: jax.Array
    done_B: jax.Array
    held_BV: jax.Array
    position_B1: jax.Array
    stop_BK: jax.Array
    seeds_B: jax.Array
    cache: StaticCache


def generate(
    model: VocoLlama, prompts: Prompts, prefix: KeyValues | None, end_id: int, sampling: SamplingConfig
) -> Generation:
    """Answers a batch of prompts; every row's answer depends on its own tokens and its own seed alone.

    Args:
      prefix: keys and values that the rows' mask counts as earlier tokens.
      end_id: the token that ends an answer.
    """
    *_, last = stream(model, prompts, prefix, end_id, sampling, sampling.max_new_tokens)
    return last


def stream(
    model: VocoLlama, prompts: Prompts, prefix: KeyValues | None, end_id: int, sampling: SamplingConfig, every: int,
    is_over: Callable[[Sequence[int]], bool] = lambda ids: False,
) -> Iterator[Generation]:
    """Like `generate`, yielding the answers so far whenever `every` more tokens are chosen.

    Args:
      is_over: given a row's tokens so far, whether its answer needs no more; asked between looks.
    """
    plan, knobs = sampling.plan, sampling.knobs
    logits_BV, progress = first_token(model, prompts, prefix, knobs, end_id=end_id, plan=plan)
    step = 0
    while True:
        step = min(step + every, plan.max_new_tokens)
        if step > 1:
            progress = more_tokens(model, progress, knobs, np.int32(step), end_id=end_id, plan=plan)
        # The next round takes the buffers over, so what is handed out is a copy.
        ids_BT, done_B = jax.device_get((progress.ids_BT, progress.done_B))
        yield Generation(ids_BT, logits_BV)
        if step == plan.max_new_tokens or done_B.all():
            return
        over_B = done_B | np.array([is_over(ids[:step].tolist()) for ids in ids_BT])
        if over_B.all():
            return
        progress = progress._replace(done_B=jax.device_put(over_B, progress.done_B.sharding))


@functools.partial(jax.jit, static_argnames=("end_id", "plan", "attention"))
def first_token(
    model: VocoLlama, prompts: Prompts, prefix: KeyValues | None, knobs: Knobs, *, end_id: int, plan: Plan,
    attention: str | None = None,
) -> tuple[jax.Array, Progress]:
    """Reads the prompts: their next logits [B, V], and the answers' beginning."""
    COMPILATIONS["first_token"] += 1  # this line runs when the program is traced
    rows = prompts.rows
    num_rows, length = rows.ids_BS.shape
    first_index = 0 if prefix is None else prefix.length
    hidden_BSE, kept = model(rows, prefix=prefix, keep=length, attention=attention)
    last_B1 = prompts.lengths_B[:, None] - 1
    pick = lambda x_BS: jnp.take_along_axis(x_BS, last_B1, axis=1)
    logits_BV = next_logits(model, jnp.take_along_axis(hidden_BSE, last_B1[..., None], axis=1))

    # Slots: prefix, prompt, answer. What the prompt's last token sees, every answer token sees.
    parts = [kept] if prefix is None else [prefix, kept]
    cache = StaticCache.starting_with(parts, plan.max_new_tokens, kept.k_LBKGD.dtype)
    prompt_K, last_index_B1 = jnp.arange(first_index + length), first_index + last_B1
    is_seen_BK = (pick(rows.start_BS) <= prompt_K) & (prompt_K <= last_index_B1) & (last_index_B1 < rows.stop_BK)
    is_seen_BK = jnp.pad(is_seen_BK, ((0, 0), (0, plan.max_new_tokens)), constant_values=True)

    index_S = jnp.arange(length)
    is_text_BS = (prompts.text_start_B[:, None] <= index_S) & (index_S <= last_B1)
    row_B1 = jnp.arange(num_rows)[:, None]
    held_BV = jnp.zeros((num_rows, logits_BV.shape[-1] if plan.penalises else 0), bool)
    if plan.penalises:
        held_BV = held_BV.at[row_B1, rows.ids_BS].max(is_text_BS)
    chosen_B = choose(logits_BV, held_BV, prompts.seeds_B, jnp.int32(0), plan, knobs)
    progress = Progress(
        step=jnp.int32(1),
        ids_BT=jnp.full((num_rows, plan.max_new_tokens), end_id, jnp.int32).at[:, 0].set(chosen_B),
        done_B=chosen_B == end_id,
        held_BV=_with_token(held_BV, chosen_B),
        position_B1=pick(rows.positions_BS) + 1,
        stop_BK=jnp.where(is_seen_BK, cache.length, 0).astype(jnp.int32),
        seeds_B=prompts.seeds_B,
        cache=cache,
    )
    return logits_BV, progress


@functools.partial(jax.jit, static_argnames=("end_id", "plan"), donate_argnames="progress")
def more_tokens(
    model: VocoLlama, progress: Progress, knobs: Knobs, until: jax.Array, *, end_id: int, plan: Plan
) -> Progress:
    """Goes on until `until` tokens are chosen or all rows are done. The cache is written in place."""
    COMPILATIONS["more_tokens"] += 1
    answers_from = progress.cache.length - plan.max_new_tokens

    def advance(now: Progress) -> Progress:
        read_B1 = jax.lax.dynamic_index_in_dim(now.ids_BT, now.step - 1, axis=1)
        hidden_B1E, cache = model.decoder.decode(
            model.decoder.embed(read_B1, model.dtype), now.position_B1 + now.step - 1, now.cache,
            answers_from + now.step - 1, now.stop_BK,
        )
        chosen_B = choose(next_logits(model, hidden_B1E), now.held_BV, now.seeds_B, now.step, plan, knobs)
        chosen_B = jnp.where(now.done_B, end_id, chosen_B)
        return now._replace(
            step=now.step + 1,
            ids_BT=now.ids_BT.at[:, now.step].set(chosen_B),
            done_B=now.done_B | (chosen_B == end_id),
            held_BV=_with_token(now.held_BV, chosen_B),
            cache=cache,
        )

    return jax.lax.while_loop(lambda now: (now.step < until) & ~now.done_B.all(), advance, progress)


def next_logits(model: VocoLlama, hidden_B1E: jax.Array) -> jax.Array:
    """fp32 logits [B, V] of the next token; an answer never contains `<voco>` or the vocabulary's padding."""
    logits_BV = model.decoder.logits(hidden_B1E)[:, 0]
    is_text_V = jnp.arange(logits_BV.shape[-1]) != model.config.voco.token_id
    return jnp.where(is_text_V, logits_BV, -jnp.inf)


def _with_token(held_BV: jax.Array, chosen_B: jax.Array) -> jax.Array:
    if held_BV.shape[1] == 0:
        return held_BV
    return held_BV.at[jnp.arange(len(chosen_B)), chosen_B].set(True)
