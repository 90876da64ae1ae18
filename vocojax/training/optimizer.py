"""AdamW with its schedule, and the learning rate of every parameter."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import optax

from vocojax.config import ConfigError
from vocojax.training.config import OptimizerConfig


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether one of the regexes matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def learning_rate_multipliers(
    names: Iterable[str], rules: Sequence[tuple[str, float | Literal["freeze"]]]
) -> dict[str, float]:
    """Returns the learning rate multiplier of every parameter that trains; the first rule that matches decides.

    Args:
      names: of all parameters.
      rules: `StageConfig.learning_rates`.

    Raises:
      ConfigError: no rule matches a parameter, or a rule decides for none.
    """
    multipliers: dict[str, float] = {}
    used = set()
    for name in names:
        deciding = next((index for index, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, name)), None)
        if deciding is None:
            raise ConfigError("learning_rates", f"must cover every parameter; no regex matches {name!r}")
        used.add(deciding)
        rate = rules[deciding][1]
        if rate != "freeze":
            multipliers[name] = rate
    for index, (pattern, _) in enumerate(rules):
        if index not in used:
            raise ConfigError("learning_rates", f"has the regex {pattern!r}, which decides for no parameter: it "
                              "matches none, or only those that one before it matches")
    return multipliers


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by the number of steps taken before: a linear warm-up, then `config.schedule`."""
    warmup, peak = round(config.warmup_share * steps), config.learning_rate
    start = 0.0 if warmup else peak
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, steps)
    stable = optax.warmup_constant_schedule(start, peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "constant":
        return stable
    decay = max(1, round(config.decay_share * steps))
    return optax.join_schedules([stable, optax.linear_schedule(peak, 0.0, decay)], [steps - decay])


def described_schedule(config: OptimizerConfig, steps: int, first: int) -> str:
    """Returns the rates of a schedule in words: at the step `first`, halfway from there, and at the last one."""
    schedule = make_schedule(config, steps)
    shape = {"cosine": "a cosine", "constant": "constant after the warm-up",
             "wsd": f"constant until it falls in the last {config.decay_share:.0%} of the steps"}[config.schedule]
    numbers = dict.fromkeys((first, (first + steps) // 2, steps))
    return f"{shape}, " + ", ".join(f"{float(schedule(number - 1)):.3g} at step {number}" for number in numbers)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW, over a flat dict of parameters."""
    adamw = optax.adamw(
        make_schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def with_multipliers(
    optimizer: optax.GradientTransformation, multipliers: Mapping[str, float]
) -> optax.GradientTransformation:
    """Returns the optimizer with its updates, weight decay included, multiplied per parameter; its state is the same.

    Args:
      optimizer: over a flat dict of parameters.
      multipliers: by the parameters' names.
    """

    def update(updates: Any, state: optax.OptState, parameters: Any = None) -> tuple[Any, optax.OptState]:
        updates, state = optimizer.update(updates, state, parameters)
        scaled = {name: value if multipliers[name] == 1 else multipliers[name] * value
                  for name, value in updates.items()}
        return scaled, state

    return optax.GradientTransformation(optimizer.init, update)


def decayed(parameters: Mapping[str, Any]) -> dict[str, bool]:
    """Returns which parameters weight decay applies to: not norm scales and biases."""
    return {name: not name.endswith(("scale", "bias")) for name in parameters}
