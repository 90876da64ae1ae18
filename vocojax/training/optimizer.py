"""What trains, and AdamW with its schedule."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax

from vocojax.config import ConfigError
from vocojax.training.config import OptimizerConfig


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the regexes matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check_rules(names: Iterable[str], train: Sequence[str], freeze: Sequence[str]) -> None:
    """Raises `ConfigError` unless every name matches exactly one of all regexes and every regex matches a name."""
    rules = [("train", pattern) for pattern in train] + [("freeze", pattern) for pattern in freeze]
    unused = set(rules)
    for name in names:
        matching = [rule for rule in rules if re.fullmatch(rule[1], name)]
        unused -= set(matching)
        if len(matching) != 1:
            found = " and ".join(f"{key} {pattern!r}" for key, pattern in matching) or "none"
            raise ConfigError("train, freeze", f"must cover every parameter once; {name!r} is covered by {found}")
    if unused:
        key, pattern = sorted(unused)[0]
        raise ConfigError(key, f"has the regex {pattern!r}, which matches no parameter")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over the first `warmup_share` of the steps, then a cosine to zero."""
    warmup = round(config.warmup_share * steps)
    start = 0.0 if warmup else config.learning_rate
    return optax.warmup_cosine_decay_schedule(start, config.learning_rate, warmup, steps)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW over a flat dict of parameters."""
    adamw = optax.adamw(
        make_schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decayed(parameters: Mapping[str, Any]) -> dict[str, bool]:
    """Weight decay spares norm scales and biases."""
    return {name: not name.endswith(("scale", "bias")) for name in parameters}
