"""How the next token is chosen."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vocojax.config import require, require_positive

SEEDS = 2**32  # how many seeds there are


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen, and what ends an answer besides the end token.

    The order is transformers': the penalty, then temperature, `top_k`, `top_p`.

    Attributes:
      max_new_tokens: the longest answer.
      temperature: 0 takes the likeliest token; else a token is drawn from the softmax of logits / temperature.
      top_k: draw from so many likeliest tokens; 0 for all.
      top_p: draw from the smallest set of tokens that holds this mass.
      repetition_penalty: logits of tokens that the text already holds are divided by it where positive and multiplied
        where negative (CTRL, arXiv 1909.05858); 1 for none. Questions and answers count, images do not.
      stop: an answer ends before that of these strings which is complete in it first.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens")
        require(self.temperature >= 0, "temperature", "must be >= 0", self.temperature)
        require(self.top_k >= 0, "top_k", "must be >= 0", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]", self.top_p)
        require(self.repetition_penalty > 0, "repetition_penalty", "must be > 0", self.repetition_penalty)
        require(all(self.stop), "stop", "must hold no empty string", self.stop)

    @property
    def plan(self) -> "Plan":
        """What of it a program is compiled for."""
        return Plan(self.max_new_tokens, self.temperature > 0, self.repetition_penalty != 1)

    @property
    def knobs(self) -> "Knobs":
        """What of it is an input of the program."""
        return Knobs(np.float32(self.temperature or 1), np.int32(self.top_k), np.float32(self.top_p),
                     np.float32(self.repetition_penalty))


GREEDY = SamplingConfig()


class Plan(NamedTuple):
    """The static part of a `SamplingConfig`."""

    max_new_tokens: int
    draws: bool
    penalises: bool


class Knobs(NamedTuple):
    """The rest of it: scalars, so that another temperature is no other program."""

    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike
    repetition_penalty: ArrayLike


def choose(
    logits_BV: jax.Array, held_BV: jax.Array, seeds_B: jax.Array, step: jax.Array, plan: Plan, knobs: Knobs
) -> jax.Array:
    """The next token of every row, int32 [B], from its own logits and its own seed.

    Args:
      logits_BV: fp32.
      held_BV: bool, the tokens that the row's text holds; unused without a penalty.
      seeds_B: uint32, unused without draws.
      step: int32, how many tokens of the answer came before.
    """
    if plan.penalises:
        logits_BV = penalise(logits_BV, held_BV, knobs)
    if not plan.draws:
        return logits_BV.argmax(-1).astype(jnp.int32)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds_B)
    return jax.vmap(jax.random.categorical)(keys_B, truncate(logits_BV, knobs)).astype(jnp.int32)


def penalise(logits_BV: jax.Array, held_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Logits with those of held tokens made smaller by the repetition penalty."""
    penalty = knobs.repetition_penalty
    return jnp.where(held_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def truncate(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Logits over the temperature, -inf outside the `top_k` likeliest tokens and the `top_p` mass among them."""
    logits_BV = logits_BV / knobs.temperature
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranks_V = jnp.arange(logits_BV.shape[-1])
    descending_BV = jnp.where((knobs.top_k == 0) | (ranks_V < knobs.top_k), descending_BV, -jnp.inf)
    masses_BV = jax.nn.softmax(descending_BV)
    mass_before_BV = jnp.cumsum(masses_BV, axis=-1) - masses_BV
    kept_BV = jnp.where((mass_before_BV < knobs.top_p) & (descending_BV > -jnp.inf), descending_BV, jnp.inf)
    return jnp.where(logits_BV >= kept_BV.min(-1, keepdims=True), logits_BV, -jnp.inf)
