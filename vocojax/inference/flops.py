"""FLOPs of the matrix products in a compiled program, loops counted as often as they run.

XLA's own `cost_analysis` counts a loop's body once, so a scan over 32 layers costs as much as one layer. This walks the
optimised HLO instead and multiplies every body with its trip count. Elementwise work is left out, as is usual.
"""

import math
import re
from typing import NamedTuple

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][a-z\-]*)\(")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_UNCOUNTED = ("convolution", "custom-call", "ragged-dot")


class CannotCount(ValueError):
    """A program with work whose FLOPs its text does not say."""


class _Call(NamedTuple):
    computations: tuple[str, ...]  # of which one, the most expensive, runs
    times: int


class _Computation(NamedTuple):
    flops: int
    calls: list[_Call]


def matmul_flops(program: jax.stages.Compiled) -> int:
    """FLOPs (two per multiply-add) of all matrix products that one run of the program computes.

    Raises:
      CannotCount: a loop without a known trip count, or an operation that hides its products (a custom call).
    """
    computations, entry = _parse(program.as_text() or "")
    counted: dict[str, int] = {}

    def total(name: str) -> int:
        if name not in counted:
            here = computations[name]
            counted[name] = here.flops + sum(call.times * max(map(total, call.computations)) for call in here.calls)
        return counted[name]

    return total(entry)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Every computation's own products and calls, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, name, here = "", "", _Computation(0, [])
    shapes: dict[str, list[int]] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, here, shapes = header[2], _Computation(0, []), {}
            computations[name] = here
            entry = name if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            label, definition = instruction.groups()
            if shape := _SHAPE.match(definition):
                shapes[label] = [int(size) for size in shape[1].split(",") if size]
            if not (found := _OPERATION.search(definition)):
                continue
            operation = found[1]
            if operation in _UNCOUNTED:
                raise CannotCount(f"the FLOPs of {operation} in {line.strip()[:200]!r} are not known")
            if operation == "dot":
                operands = re.findall(r"%([\w.\-]+)", definition[found.end() :].split(")")[0])
                contracted = [shapes[operands[0]][int(i)] for i in _braces(definition, "lhs_contracting_dims")]
                here = computations[name] = here._replace(
                    flops=here.flops + 2 * math.prod(shapes[label]) * math.prod(contracted)
                )
            here.calls.extend(_calls(operation, definition, line))
    return computations, entry


def _calls(operation: str, definition: str, line: str) -> list[_Call]:
    named = lambda key: re.findall(rf"\b{key}=%?([\w.\-]+)", definition)
    if operation == "while":
        trips = _TRIP_COUNT.search(definition)
        if not trips:
            raise CannotCount(f"how often the loop in {line.strip()[:200]!r} runs is not known")
        return [_Call(tuple(named("body")), int(trips[1]))]
    if operation == "conditional":
        branches = _braces(definition, "branch_computations") or named("true_computation") + named("false_computation")
        return [_Call(tuple(branch.strip(" %") for branch in branches), 1)]
    return [_Call((callee,), 1) for key in ("calls", "to_apply") for callee in named(key)]


def _braces(definition: str, key: str) -> list[str]:
    found = re.search(rf"\b{key}=\{{([^}}]*)\}}", definition)
    return [part for part in found[1].split(",") if part] if found else []
