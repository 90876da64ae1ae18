"""The second inference stage: text is read, after a cache or with its images, and answered token by token.

`first_token` reads the prompts and chooses the first token; `more_tokens` is the one compiled loop over a static cache
that chooses the others. It stops wherever the host wants to look (streaming, stop strings) and continues from there.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.inference.decoding.sampling import SamplingConfig, SamplingInputs, SamplingStatics, choose
from vocojax.models import two_stage
from vocojax.models.llama import KeyValues, StaticCache
from vocojax.models.voco import Rows, VocoLlama
from vocojax.parallel.mesh import place_rows

# How often each program was compiled. A server's counts stand still once it has met all lengths.
COMPILATIONS: collections.Counter[str] = collections.Counter()
LOOK_EVERY = 16  # tokens between looks at the text where strings may end an answer


class Prompts(NamedTuple):
    """Prompts, one to a row; `inference/prompts.py` makes them.

    Attributes:
      rows: the tokens, whole or text after a prefix, padded at the end.
      lengths_B: int32, tokens of each row that are no padding.
      text_start_B: int32, the first token of each row that is text.
      answer_position_B: int32, rotary position of each answer's first token.
      answer_sees_BK: bool, the keys of prefix and prompt that the answer's tokens see.
    """

    rows: Rows
    lengths_B: jax.Array
    text_start_B: jax.Array
    answer_position_B: jax.Array
    answer_sees_BK: jax.Array


class Generation(NamedTuple):
    """Answers so far.

    Attributes:
      ids_BT: int32, padded with the end token up to the largest length limit.
      logits_BV: fp32, of each row's first token.
    """

    ids_BT: jax.Array
    logits_BV: jax.Array


class Progress(NamedTuple):
    """Answers under way, T tokens at most.

    Attributes:
      step: int32, tokens chosen so far.
      ids_BT: int32 answers, the end token where none is chosen.
      done_B: bool, rows whose answer is complete.
      held_BV: bool, tokens that the row's text holds; [B, 0] where no row has a penalty.
      position_B1: int32, position of the first answer token.
      stop_BK: int32 mask of the cache's slots.
      cache: keys and values of prefix, prompt and answer.
    """

    step: jax.Array
    ids_BT: jax.Array
    done_B: jax.Array
    held_BV: jax.Array
    position_B1: jax.Array
    stop_BK: jax.Array
    cache: StaticCache


def stream(
    model: VocoLlama,
    prompts: Prompts,
    prefix: KeyValues | None,
    end_id: int,
    samplings: Sequence[SamplingConfig],
    every: int,
    is_over: Callable[[int, Sequence[int]], bool],
) -> Iterator[Generation]:
    """Answers a batch of prompts; a row's answer depends only on its own tokens and settings.

    Args:
      model: answers.
      prompts: host arrays.
      prefix: keys and values that the rows' mask counts as earlier tokens, or None.
      end_id: the token that ends an answer.
      samplings: one per row.
      every: tokens between looks at the answers.
      is_over: takes a row and its tokens so far, and returns whether its answer needs no more.

    Yields:
      The answers so far, whenever `every` more tokens are chosen and at the end.
    """
    statics = SamplingStatics.of(samplings)
    longest = max(sampling.max_new_tokens for sampling in samplings)
    inputs, prompts = place_rows((SamplingInputs.of(samplings), prompts))
    logits_BV, progress = first_token(model, prompts, prefix, inputs, end_id=end_id, statics=statics)
    step = 0
    while True:
        step = min(step + every, longest)
        if step > 1:
            progress = more_tokens(model, progress, inputs, np.int32(step), end_id=end_id, statics=statics)
        # The next round takes the buffers over, so what is handed out is a copy.
        ids_BT, done_B = jax.device_get((progress.ids_BT[:, :longest], progress.done_B))
        yield Generation(ids_BT, logits_BV)
        if step == longest or done_B.all():
            return
        over_B = done_B | np.array([is_over(row, ids[:step].tolist()) for row, ids in enumerate(ids_BT)])
        if over_B.all():
            return
        progress = progress._replace(done_B=jax.device_put(over_B, progress.done_B.sharding))


@functools.partial(jax.jit, static_argnames=("end_id", "statics", "attention"))
def first_token(
    model: VocoLlama,
    prompts: Prompts,
    prefix: KeyValues | None,
    inputs: SamplingInputs,
    *,
    end_id: int,
    statics: SamplingStatics,
    attention: str | None = None,
) -> tuple[jax.Array, Progress]:
    """Reads the prompts and returns their next logits [B, V] and the answers' first tokens."""
    COMPILATIONS["first_token"] += 1  # this line runs when the program is traced
    rows = prompts.rows
    num_rows, length = rows.ids_BS.shape
    hidden_BSE, kept = two_stage.read(model, rows, prefix, keep=length, attention=attention)
    last_B1 = prompts.lengths_B[:, None] - 1
    logits_BV = next_logits(model, jnp.take_along_axis(hidden_BSE, last_B1[..., None], axis=1))

    # Slots: prefix, prompt, answer.
    parts = [kept] if prefix is None else [prefix, kept]
    cache = StaticCache.starting_with(parts, statics.slots, kept.k_LBKGD.dtype)
    sees_BK = jnp.pad(prompts.answer_sees_BK, ((0, 0), (0, statics.slots)), constant_values=True)

    held_BV = jnp.zeros((num_rows, logits_BV.shape[-1] if statics.penalises else 0), bool)
    if statics.penalises:
        index_S = jnp.arange(length)
        is_text_BS = (prompts.text_start_B[:, None] <= index_S) & (index_S <= last_B1)
        held_BV = held_BV.at[jnp.arange(num_rows)[:, None], rows.ids_BS].max(is_text_BS)
    chosen_B = choose(logits_BV, held_BV, jnp.int32(0), inputs, statics)
    progress = Progress(
        step=jnp.int32(1),
        ids_BT=jnp.full((num_rows, statics.slots), end_id, jnp.int32).at[:, 0].set(chosen_B),
        done_B=(chosen_B == end_id) | (inputs.max_new_tokens_B <= 1),
        held_BV=_with_token(held_BV, chosen_B),
        position_B1=prompts.answer_position_B[:, None],
        stop_BK=jnp.where(sees_BK, cache.length, 0).astype(jnp.int32),
        cache=cache,
    )
    return logits_BV, progress


@functools.partial(jax.jit, static_argnames=("end_id", "statics"), donate_argnames="progress")
def more_tokens(
    model: VocoLlama,
    progress: Progress,
    inputs: SamplingInputs,
    until: jax.Array,
    *,
    end_id: int,
    statics: SamplingStatics,
) -> Progress:
    """Continues until `until` tokens are chosen or all rows are done. The cache is written in place."""
    COMPILATIONS["more_tokens"] += 1
    answers_from = progress.cache.length - statics.slots

    def advance(now: Progress) -> Progress:
        read_B1 = jax.lax.dynamic_index_in_dim(now.ids_BT, now.step - 1, axis=1)
        hidden_B1E, cache = model.decoder.decode(
            model.decoder.embed(read_B1, model.dtype), now.position_B1 + now.step - 1, now.cache,
            answers_from + now.step - 1, now.stop_BK,
        )
        chosen_B = choose(next_logits(model, hidden_B1E), now.held_BV, now.step, inputs, statics)
        chosen_B = jnp.where(now.done_B, end_id, chosen_B)
        step = now.step + 1
        return now._replace(
            step=step,
            ids_BT=now.ids_BT.at[:, now.step].set(chosen_B),
            done_B=now.done_B | (chosen_B == end_id) | (inputs.max_new_tokens_B <= step),
            held_BV=_with_token(now.held_BV, chosen_B),
            cache=cache,
        )

    return jax.lax.while_loop(lambda now: (now.step < until) & ~now.done_B.all(), advance, progress)


def next_logits(model: VocoLlama, hidden_B1E: jax.Array) -> jax.Array:
    """Returns fp32 logits [B, V] of the next token; an answer never contains `<voco>` or the vocabulary's padding."""
    logits_BV = model.decoder.logits(hidden_B1E)[:, 0]
    is_text_V = jnp.arange(logits_BV.shape[-1]) != model.config.voco.token_id
    return jnp.where(is_text_V, logits_BV, -jnp.inf)


def _with_token(held_BV: jax.Array, chosen_B: jax.Array) -> jax.Array:
    if held_BV.shape[1] == 0:
        return held_BV
    return held_BV.at[jnp.arange(len(chosen_B)), chosen_B].set(True)
