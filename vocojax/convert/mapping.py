"""How the tensors of a published layout map to the model's parameters: tables of (regex -> path, transform).

A rule is written once, as a tensor's name with `{layer}` in it, and serves both directions: as the regex that
recognises a tensor, and as the name a parameter is written under. `Table.resolve` holds a table against a model's
parameters: each is claimed by exactly one rule, each tensor recognised by exactly one.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from vocojax.errors import ConvertError
from vocojax.weights import Shape

Array = np.ndarray


class Transform(NamedTuple):
    """A tensor <-> a parameter (one layer of it, where layers are stacked).

    forward, backward: tensor -> parameter, parameter -> tensor.
    shape: the parameter's shape -> the tensor's.
    transposes: whether `forward` is a mere transposition (True) or nothing at all (False), so that a slice of the
      parameter is a slice of the tensor; None for anything else.
    """

    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    shape: Callable[[Shape], Shape]
    transposes: bool | None = None


IDENTITY = Transform(lambda x: x, lambda x: x, lambda shape: shape, transposes=False)
TRANSPOSE = Transform(np.transpose, np.transpose, lambda shape: shape[::-1], transposes=True)


def patches(size: int) -> Transform:
    """A convolution over patches [E, 3, size, size] <-> a linear map from (row, column, channel) [size*size*3, E]."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * 3, -1),
        lambda x: x.reshape(size, size, 3, -1).transpose(3, 2, 0, 1),
        lambda shape: (shape[1], 3, size, size),
    )


def leading_ones(count: int) -> Transform:
    """A tensor with `count` axes of length 1 in front that the parameter doesn't have."""
    return Transform(
        lambda x: x.reshape(x.shape[count:]),
        lambda x: x.reshape((1,) * count + x.shape),
        lambda shape: (1,) * count + shape,
    )


def vocabulary(rows: int, vocab_size: int, new_id: int | None = None, *, transposed: bool) -> Transform:
    """An embedding [rows, E] <-> one [vocab_size, E] with room for `<voco>` and for rows that only make it shardable.

    Args:
      rows: the tensor's. What the parameter has beyond is dropped on the way back; what it lacks comes as zeros.
      vocab_size: the parameter's rows.
      new_id: a row that becomes the mean of those before it, as a token's that was never trained; None for none.
      transposed: whether the parameter is the head's kernel [E, vocab_size] instead.
    """

    def resize(x: Array, size: int) -> Array:
        return np.concatenate([x[:size], np.zeros((max(0, size - len(x)), x.shape[1]), x.dtype)])

    def forward(x: Array) -> Array:
        grown = resize(x, vocab_size)
        if new_id is not None:
            grown[new_id] = x[:new_id].mean(0, dtype=np.float32)
        return grown.T if transposed else grown

    def backward(x: Array) -> Array:
        return resize(x.T if transposed else x, rows)

    return Transform(forward, backward, lambda shape: (rows, shape[0] if transposed else shape[1]))


class Rule(NamedTuple):
    """Tensors called `name` hold the parameter `path`.

    Where `name` has `{layer}` in it, the parameter is a stack of `layers`, the numbers that `{layer}` goes through.
    """

    name: str
    path: str
    transform: Transform = IDENTITY
    layers: range | None = None

    @property
    def names(self) -> list[str]:
        """The tensors' names, layer by layer."""
        return [self.name] if self.layers is None else [self.name.format(layer=layer) for layer in self.layers]

    def recognises(self, name: str) -> bool:
        """Whether a tensor of that name is this rule's."""
        found = _regex(self.name).fullmatch(name)
        return found is not None and (self.layers is None or int(found["layer"]) in self.layers)


@functools.cache
def _regex(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(re.escape("{layer}"), r"(?P<layer>0|[1-9]\d*)"))


class Slot(NamedTuple):
    """Where a tensor belongs: a parameter, the layer of it (None where it isn't stacked), and how it gets there."""

    path: str
    layer: int | None
    transform: Transform
    shape: Shape  # the tensor's


@dataclasses.dataclass(frozen=True)
class Table:
    """One layout.

    ignored: regexes of tensors that files of this layout may hold and the model has no use for.
    aliases: (regex, replacement) pairs, applied in order to a tensor's name: other names the same tensors go by.
    """

    layout: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """The name the rules use for a tensor."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor (by its canonical name) holds nothing of the model's."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def resolve(self, shapes: Mapping[str, Shape]) -> dict[str, Slot]:
        """The tensors that make up a model with parameters of these shapes, by canonical name.

        Raises:
          ConvertError: a parameter without a rule or with several, a rule without a parameter or of another depth, a
            tensor that several rules recognise.
        """
        claims = Counter(rule.path for rule in self.rules)
        problems = [f"parameter {path} has no rule" for path in shapes if path not in claims]
        problems += [f"parameter {path} has {count} rules" for path, count in claims.items() if count > 1]
        problems += [f"rule {rule.name} is for {rule.path}, which the model doesn't have" for rule in self.rules
                     if rule.path not in shapes]
        problems += [f"rule {rule.name} has {len(rule.layers)} layers, {rule.path} {shapes[rule.path][0]}"
                     for rule in self.rules
                     if rule.path in shapes and rule.layers and len(rule.layers) != shapes[rule.path][0]]
        slots: dict[str, Slot] = {}
        for rule in () if problems else self.rules:
            shape = shapes[rule.path] if rule.layers is None else shapes[rule.path][1:]
            for index, name in enumerate(rule.names):
                layer = None if rule.layers is None else index
                slots[name] = Slot(rule.path, layer, rule.transform, rule.transform.shape(shape))
                if self.ignores(name) or sum(other.recognises(name) for other in self.rules) != 1:
                    problems.append(f"tensor {name} is recognised by several rules")
        if problems:
            raise ConvertError(f"the table of the layout {self.layout!r} doesn't fit the model: {'; '.join(problems)}")
        return slots
