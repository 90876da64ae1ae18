"""How the next token is chosen: every row of a batch by its own settings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import SEEDS, require, require_positive, require_seed
from vocojax.errors import InputError

COLDEST = 1e-5  # a lower temperature takes the likeliest token: logits divided by it would leave float32's range
LARGEST = 1e9  # of temperatures and penalties, for the same reason
MAX_NEW_TOKENS = 2**20  # room for each token of an answer is made before its first one


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one answer are chosen, and what ends it in addition to the end token.

    The order is that of transformers: the penalty, then temperature, `top_k`, `top_p`.

    Attributes:
      max_new_tokens: length limit of the answer, in tokens.
      temperature: below 1e-5 the likeliest token is taken; else one is drawn from the softmax of logits / temperature.
      top_k: draw from this many likeliest tokens; 0 for all.
      top_p: draw from the smallest set of tokens that holds this probability mass.
      repetition_penalty: logits of tokens that the text already holds are divided by it where positive and multiplied
        where negative (CTRL, arXiv 1909.05858); 1 for none. Questions and answers count, images do not.
      stop: the answer ends before the first of these strings that is complete in it.
      seed: of the draws, in [0, 2**32).
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "top_k"):
            value = getattr(self, key)
            require(isinstance(value, int) and not isinstance(value, bool), key, "must be a whole number", value)
        for key in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, key)
            require(isinstance(value, int | float) and not isinstance(value, bool), key, "must be a number", value)
        is_strings = isinstance(self.stop, tuple | list) and all(isinstance(text, str) for text in self.stop)
        require(is_strings, "stop", "must be a tuple of strings, as in stop=('\\n',)", self.stop)
        require_positive(self, "max_new_tokens")
        require(self.max_new_tokens <= MAX_NEW_TOKENS, "max_new_tokens", f"must be <= {MAX_NEW_TOKENS}",
                self.max_new_tokens)
        require(self.temperature >= 0, "temperature", "must be >= 0", self.temperature)
        require(self.temperature <= LARGEST, "temperature", f"must be <= {LARGEST:g}", self.temperature)
        require(self.top_k >= 0, "top_k", "must be >= 0", self.top_k)
        require(self.top_k < 2**31, "top_k", "must be < 2**31", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]", self.top_p)
        require(self.repetition_penalty > 0, "repetition_penalty", "must be > 0", self.repetition_penalty)
        require(1 / LARGEST <= self.repetition_penalty <= LARGEST, "repetition_penalty",
                f"must be in [{1 / LARGEST:g}, {LARGEST:g}]", self.repetition_penalty)
        require(all(self.stop), "stop", "must hold no empty string", self.stop)
        require_seed(self.seed)

    @property
    def draws(self) -> bool:
        """True if tokens are drawn, False if the likeliest one is taken."""
        return self.temperature >= COLDEST


GREEDY = SamplingConfig()


class SamplingStatics(NamedTuple):
    """Settings that a program is compiled for; the rows of a batch share them.

    Attributes:
      slots: room for answer tokens, at least the largest length limit.
      draws: true if any row draws its tokens.
      penalises: true if any row has a repetition penalty.
    """

    slots: int
    draws: bool
    penalises: bool

    @classmethod
    def of(cls, samplings: Sequence[SamplingConfig]) -> "SamplingStatics":
        """Returns the statics of a batch.

        Slots are rounded up to a quarter of the power of two below, so that few programs serve all length limits.
        """
        longest = max(sampling.max_new_tokens for sampling in samplings)
        step = 1 << max(0, (longest - 1).bit_length() - 3)
        return cls(-(-longest // step) * step, any(sampling.draws for sampling in samplings),
                   any(sampling.repetition_penalty != 1 for sampling in samplings))


def one_each(sampling: SamplingConfig, seeds: Sequence[int] | None, count: int) -> list[SamplingConfig]:
    """Returns the settings of several rows, the same but for the seeds; these count up by default.

    Raises:
      InputError: there are more or fewer seeds than rows.
      ConfigError: a seed is not in [0, 2**32).
    """
    seeds = [(sampling.seed + index) % SEEDS for index in range(count)] if seeds is None else seeds
    if len(seeds) != count:
        raise InputError(f"seeds must be one per question, got {len(seeds)} for {count}")
    whole = [int(seed) if isinstance(seed, np.integer) else seed for seed in seeds]
    return [dataclasses.replace(sampling, seed=seed) for seed in whole]


class SamplingInputs(NamedTuple):
    """The settings of a batch's rows as arrays, so that other values are no other program.

    Attributes:
      max_new_tokens_B: int32.
      temperature_B: fp32, 0 for rows that take the likeliest token.
      top_k_B: int32.
      top_p_B: fp32.
      repetition_penalty_B: fp32.
      seeds_B: uint32.
    """

    max_new_tokens_B: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    repetition_penalty_B: jax.Array
    seeds_B: jax.Array

    @classmethod
    def of(cls, samplings: Sequence[SamplingConfig]) -> "SamplingInputs":
        """Returns the settings of rows as host arrays."""
        smallest = float(np.finfo(np.float32).tiny)  # less would be rounded to 0, and no token is within a mass of 0
        columns: list[tuple[list[Any], Any]] = [
            ([s.max_new_tokens for s in samplings], np.int32),
            ([s.temperature if s.draws else 0 for s in samplings], np.float32),
            ([s.top_k for s in samplings], np.int32),
            ([max(s.top_p, smallest) for s in samplings], np.float32),
            ([s.repetition_penalty for s in samplings], np.float32),
            ([s.seed for s in samplings], np.uint32),
        ]
        return cls(*(np.array(values, dtype) for values, dtype in columns))  # type: ignore[arg-type]


def choose(
    logits_BV: jax.Array, held_BV: jax.Array, step: jax.Array, inputs: SamplingInputs, statics: SamplingStatics
) -> jax.Array:
    """Chooses the next token of every row by the row's own logits, settings and seed.

    Args:
      logits_BV: fp32.
      held_BV: bool, the tokens that the row's text holds; unused where no row has a penalty.
      step: int32, how many tokens of the answers came before.
      inputs: the rows' settings.
      statics: of the batch.

    Returns:
      int32 [B].
    """
    if statics.penalises:
        logits_BV = penalise(logits_BV, held_BV, inputs)
    likeliest_B = likeliest(logits_BV)
    if not statics.draws:
        return likeliest_B
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(inputs.seeds_B)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, truncate(logits_BV, inputs)).astype(jnp.int32)
    return jnp.where(inputs.temperature_B > 0, drawn_B, likeliest_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Returns int32 [B], the first of each row's tokens with the largest logit.

    This is `argmax` in two reductions. XLA's CPU backend does not vectorise a reduction that carries an index: at 32
    rows it took a sixth of decoding.
    """
    highest_B1 = logits_BV.max(-1, keepdims=True)
    last = logits_BV.shape[-1] - 1
    return jnp.where(logits_BV < highest_B1, last, jnp.arange(last + 1, dtype=jnp.int32)).min(-1)


def penalise(logits_BV: jax.Array, held_BV: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Makes the logits of held tokens smaller by the rows' repetition penalties."""
    penalty_B1 = inputs.repetition_penalty_B[:, None]
    return jnp.where(held_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)


def truncate(logits_BV: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Divides logits by the temperature; outside the `top_k` likeliest tokens and the `top_p` mass they become -inf."""
    temperature_B1 = jnp.where(inputs.temperature_B > 0, inputs.temperature_B, 1)[:, None]
    top_k_B1, top_p_B1 = inputs.top_k_B[:, None], inputs.top_p_B[:, None]
    logits_BV = logits_BV / temperature_B1
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranks_V = jnp.arange(logits_BV.shape[-1])
    descending_BV = jnp.where((top_k_B1 == 0) | (ranks_V < top_k_B1), descending_BV, -jnp.inf)
    masses_BV = jax.nn.softmax(descending_BV)
    mass_before_BV = jnp.cumsum(masses_BV, axis=-1) - masses_BV
    kept_BV = jnp.where((mass_before_BV < top_p_B1) & (descending_BV > -jnp.inf), descending_BV, jnp.inf)
    return jnp.where(logits_BV >= kept_BV.min(-1, keepdims=True), logits_BV, -jnp.inf)
