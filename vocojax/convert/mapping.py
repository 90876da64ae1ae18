"""Tables that map the tensors of a published layout to the model's parameters.

A rule holds a tensor's name, which may contain `{layer}`, a parameter's path and a transform. One rule serves both
directions: its name is the regex that matches tensors when reading, and the tensor's name when writing.
`Table.resolve` checks a table against a model's parameters: exactly one rule for each parameter and each tensor.
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
    """A conversion between a tensor and a parameter (or one layer of a stacked parameter), in both directions.

    Attributes:
      forward: makes the parameter from the tensor.
      backward: makes the tensor from the parameter.
      shape: maps the parameter's shape to the tensor's.
      transposes: True if `forward` only transposes, False if it changes nothing; a slice of the parameter is then a
        slice of the tensor. None for anything else.
    """

    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    shape: Callable[[Shape], Shape]
    transposes: bool | None = None


IDENTITY = Transform(lambda x: x, lambda x: x, lambda shape: shape, transposes=False)
TRANSPOSE = Transform(np.transpose, np.transpose, lambda shape: shape[::-1], transposes=True)


def patches(size: int) -> Transform:
    """Returns the transform of a convolution over patches to a linear map.

    The tensor is [E, 3, size, size], the parameter [size*size*3, E] with its inputs in the order (row, column,
    channel).
    """
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * 3, -1),
        lambda x: x.reshape(size, size, 3, -1).transpose(3, 2, 0, 1),
        lambda shape: (shape[1], 3, size, size),
    )


def leading_ones(count: int) -> Transform:
    """Returns the transform that removes the tensor's `count` leading axes of length 1."""
    return Transform(
        lambda x: x.reshape(x.shape[count:]),
        lambda x: x.reshape((1,) * count + x.shape),
        lambda shape: (1,) * count + shape,
    )


def vocabulary(rows: int, vocab_size: int, new_id: int | None = None, *, transposed: bool) -> Transform:
    """Returns the transform of an embedding [rows, E] to one [vocab_size, E] with rows for `<voco>` and for padding.

    Args:
      rows: rows of the tensor. `backward` drops further rows of the parameter and fills missing ones with zeros.
      vocab_size: rows of the parameter.
      new_id: the row of a new, untrained token: it becomes the mean of the rows before it. None: no new token.
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
    """A parameter and the tensors that hold it.

    Attributes:
      name: the tensors' name; `{layer}` in it stands for a layer's number.
      path: the parameter.
      transform: from a tensor to the parameter, or to one layer of it.
      layers: the layers' numbers, where the parameter is a stack of layers; else None.
    """

    name: str
    path: str
    transform: Transform = IDENTITY
    layers: range | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tensors, layer by layer."""
        return [self.name] if self.layers is None else [self.name.format(layer=layer) for layer in self.layers]

    def matches(self, name: str) -> bool:
        """Returns whether this rule is for a tensor of that name."""
        found = _regex(self.name).fullmatch(name)
        return found is not None and (self.layers is None or int(found["layer"]) in self.layers)


@functools.cache
def _regex(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(re.escape("{layer}"), r"(?P<layer>0|[1-9]\d*)"))


class Slot(NamedTuple):
    """The place of a tensor among the parameters.

    Attributes:
      path: the parameter.
      layer: the layer of a stacked parameter, else None.
      transform: from the tensor to the parameter, or to its layer.
      shape: the tensor's shape.
    """

    path: str
    layer: int | None
    transform: Transform
    shape: Shape

    def of(self, parameter: Array) -> Array:
        """Returns the parameter, or the tensor's layer of a stacked one."""
        return parameter if self.layer is None else parameter[self.layer]


@dataclasses.dataclass(frozen=True)
class Table:
    """The table of one layout.

    Attributes:
      layout: the layout's name, for errors.
      rules: one for each parameter.
      ignored: regexes of tensors that files of this layout may hold and the model does not use.
      aliases: (regex, replacement) pairs that are applied, in order, to a tensor's name: they turn other names of the
        tensors into the rules' names.
    """

    layout: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """Returns a tensor's name in the rules."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Returns whether the model does not use a tensor (by its canonical name)."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def resolve(self, shapes: Mapping[str, Shape]) -> dict[str, Slot]:
        """Returns the tensors of a model by canonical name.

        Args:
          shapes: shapes of the model's parameters by path.

        Raises:
          ConvertError: a parameter without a rule or with several, a rule without a parameter or of another depth, or
            a tensor that several rules match.
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
                if self.ignores(name) or sum(other.matches(name) for other in self.rules) != 1:
                    problems.append(f"tensor {name} is matched by several rules")
        if problems:
            raise ConvertError(f"the table of the layout {self.layout!r} doesn't fit the model: {'; '.join(problems)}")
        return slots
