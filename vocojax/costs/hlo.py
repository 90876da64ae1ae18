"""Reads XLA's optimised HLO text: instructions by computation, what they call, and how often each computation runs.

The text of a program, as much of it as is read here:

    %body (p: f32[8]) -> f32[8] {                            a computation: its head, instructions, a brace
      %p = f32[8]{0} parameter(0)                            %name = shape op(operands), attributes
      ROOT %double = f32[8]{0} add(%p, %p), metadata={op_name="jit(step)/add"}
    }

    ENTRY %main (a: f32[8]) -> f32[8] {                      the computation that a run starts with
      %a = f32[8]{0} parameter(0)
      ROOT %loop = f32[8]{0} while(%a), condition=%condition, body=%body
    }
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "s4": 0.5, "u4": 0.5,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8,
}  # fmt: skip

# The head of a computation: `ENTRY` or nothing, and its name.
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{\s*$")
# An instruction: `ROOT` or nothing, its name, shape and operation, and the rest of the line after the parenthesis.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# A name, of an instruction or a computation.
_NAME = re.compile(r"%([\w.\-]+)")
# One array of a shape: its dtype, sizes and layout, `bf16[8,16]{1,0:T(8,128)(2,1)S(1)}`.
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
# The sizes of an array, whatever its dtype.
_SIZES = re.compile(r"\[([\d,]*)\]")
# A memory other than HBM in an array's layout, `S(1)`.
_OTHER_MEMORY = re.compile(r"S\([1-9]")
# An attribute that names the computations an instruction calls, `calls=%fused` or `branch_computations={%a, %b}`.
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|called_computations|(?:branch|true|false)_computations?)"
    r"=\{?((?:%[\w.\-]+(?:, )?)+)"
)
# What XLA's TPU cost model says of an instruction, written once code is generated.
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,15})"')
# How often a loop runs, where XLA found out.
_KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# The JAX operation that an instruction comes from.
_SCOPE = re.compile(r'op_name="([^"]*)"')
# The groups of devices that a collective runs in, in XLA's three notations: `[2,4]<=[8]` (2 groups of 4),
# `{{0,1},{2,3}}`, and `mesh['a'=4,'b'=2] {'a'}` (along the axes in braces).
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
# The contracted axes of a product's left operand, as XLA writes them and as cuBLAS's configuration does.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
# What the axes of a convolution are: `bf` batch and feature, `io` in and out, digits spatial. `b0f_0io->b0f`.
_CONVOLUTION_AXES = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# A setting of a convolution's window, one number per spatial axis: `stride=3x1`, `pad=3_3x0_0`.
_WINDOW = re.compile(r"(lhs_dilate|rhs_dilate|stride|pad)=([\dx_\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape op(operands), attributes`.

    Attributes:
      name: of the instruction, and of its result.
      shape: of its result, with layouts.
      op: the operation.
      operands: names of the instructions that it reads.
      text: everything after the opening parenthesis.
      root: whether its result is that of its computation.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str
    root: bool

    def __str__(self) -> str:
        return f"%{self.name} = {self.shape} {self.op}({self.text}"

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name for group in _CALLED.findall(self.text) for name in _NAME.findall(group)]

    @property
    def cycles(self) -> int:
        """The cycles that XLA's TPU cost model gives it; 0 where it gives none."""
        match = _CYCLES.search(self.text)
        return int(match[1]) if match else 0

    @property
    def known_trips(self) -> int | None:
        """How often it runs if it is a loop and XLA notes it."""
        match = _KNOWN_TRIPS.search(self.text)
        return int(match[1]) if match else None

    @property
    def scope(self) -> str:
        """The JAX operation it comes from, with its named scopes (`jit(step)/decoder/dot_general`), or ''."""
        match = _SCOPE.search(self.text)
        return match[1] if match else ""

    def is_in(self, name: str) -> bool:
        """Returns whether it comes from a `jax.named_scope` of that name."""
        return re.search(rf"[/(]{name}[/)]", self.scope) is not None


@dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: their instructions, by name.
      entry: the computation that a run starts with.
      runs: how often each computation runs in one run of the program.
      fused: computations that are the inside of an instruction, as a fusion's is. The others are the program's control
        flow.
      callers: by computation, the instruction that calls it.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    runs: Counter[str]
    fused: set[str]
    callers: dict[str, str]


def parse(text: str, open_loops: Mapping[str, int] | None = None) -> Module:
    """Reads a module from an HLO dump (`*after_optimizations*.txt`, `*after_codegen.txt`).

    Args:
      text: the dump.
      open_loops: how often loops run whose number of turns depends on the data, by the named scope that they are in.
        Loops in other scopes count once.

    Raises:
      ValueError: the text is no HLO dump.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            is_root, name, shape, op, rest = match.groups()
            operands = tuple(_NAME.findall(rest.split("), ")[0]))
            current.append(Instruction(name, shape, op, operands, rest, bool(is_root)))
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is no HLO dump")

    instructions = [instruction for body in computations.values() for instruction in body]
    callers = {called: instruction.name for instruction in instructions for called in instruction.called}
    fused = {called for instruction in instructions if instruction.op not in ("while", "conditional", "call")
             for called in instruction.called}
    runs: Counter[str] = Counter()
    _count_runs(computations, entry, 1, runs, open_loops or {})
    return Module(computations, entry, runs, fused, callers)


def _count_runs(
    computations: dict[str, list[Instruction]], name: str, times: int, runs: Counter[str], open_loops: Mapping[str, int]
) -> None:
    """Adds to `runs` that a computation runs `times` times, with all that it calls. Every branch of a conditional
    counts."""
    runs[name] += times
    for instruction in computations.get(name, ()):
        inner = times * _trips(computations, instruction, open_loops) if instruction.op == "while" else times
        for called in instruction.called:
            _count_runs(computations, called, inner, runs, open_loops)


def _trips(computations: dict[str, list[Instruction]], loop: Instruction, open_loops: Mapping[str, int]) -> int:
    """Returns how often a loop runs: as XLA notes, or else the largest constant that its condition compares with. An
    open loop has neither."""
    if loop.known_trips is not None:
        return loop.known_trips
    condition = re.search(r"condition=%([\w.\-]+)", loop.text)
    constants = [
        int(number)
        for instruction in _with_callees(computations, condition[1] if condition else "")
        if instruction.op == "constant"
        for number in re.findall(r"^(\d+)\)", instruction.text)
    ]
    return max(constants, default=next((trips for scope, trips in open_loops.items() if loop.is_in(scope)), 1))


def _with_callees(computations: dict[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    for instruction in computations.get(name, ()):
        yield instruction
        for called in instruction.called:
            yield from _with_callees(computations, called)


def array_bytes(shape: str, *, hbm_only: bool = False) -> float:
    """Returns the bytes of all arrays in a shape; `hbm_only` leaves out those that XLA placed in another memory."""
    return sum(
        ITEM_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes, layout in _ARRAY.findall(shape)
        if dtype in ITEM_BYTES and not (hbm_only and _OTHER_MEMORY.search(layout))
    )


def arrays(shape: str) -> list[str]:
    """Returns the shapes of the arrays in a (tuple) shape, layouts included."""
    return [match[0] for match in _ARRAY.finditer(shape)]


def group_size(collective: Instruction, devices: int) -> int:
    """Returns how many devices a collective spans, by its replica groups; all of them if it names none."""
    text = collective.text
    if iota := _IOTA_GROUPS.search(text):
        return int(iota[1])
    if listed := _LISTED_GROUPS.search(text):
        return listed[1].count(",") + 1
    if mesh := _MESH_GROUPS.search(text):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([\w.]+)'", mesh[2]))
    return devices


def is_product(instruction: Instruction) -> bool:
    """Returns whether it is a matrix product, also one that cuBLAS computes."""
    return instruction.op in ("dot", "convolution") or (
        instruction.op == "custom-call" and 'custom_call_target="__cublas' in instruction.text)


def product_flops(product: Instruction, shapes: dict[str, str]) -> float:
    """Returns the multiplications and additions of a product; 0 if the text does not tell.

    Args:
      product: see `is_product`.
      shapes: of all instructions, by name.
    """
    if len(product.operands) < 2 or any(name not in shapes for name in product.operands[:2]):
        return 0
    left, right = (_sizes(shapes[name]) for name in product.operands[:2])
    if product.op == "convolution":
        return _convolution_flops(product, left, right)
    axes = _CONTRACTED.search(product.text)
    contracted = [left[int(axis)] for axis in re.findall(r"\d+", axes[1] if axes else "")]
    return 2 * math.prod(_sizes(product.shape)) * math.prod(contracted)


def _convolution_flops(product: Instruction, left: list[int], right: list[int]) -> float:
    """Returns the FLOPs of a convolution, multiplications with padding left out.

    On TPU XLA writes matrix products as convolutions. It turns a product's batch axis into a spatial one, with a window
    in which only equal positions meet; all other pairs of positions meet padding, which costs nothing. So the pairs
    of an output position o and a kernel position k have to be counted, for each spatial axis.

    Along such an axis the left operand is dilated, with `lhs_dilate - 1` zeros after each of its elements but the last,
    and then padded, with `pad` zeros in front. Kernel positions are `rhs_dilate` apart, output positions `stride`. Of
    4 elements dilated by 2, o and k meet the position p = o * stride + k * rhs_dilate - pad:

        p              -1   0   1   2   3   4   5   6   7
        left operand    .   a   .   b   .   c   .   d   .         a pair counts where p is a multiple of 2 in [0, 6]
    """
    labels = _CONVOLUTION_AXES.search(product.text)
    if not labels:
        return 0
    left_axes, right_axes, out_axes = labels.groups()
    out = _sizes(product.shape)
    window = {setting: numbers.split("x") for setting, numbers in _WINDOW.findall(product.text)}

    def setting(name: str, axis: int, default: int) -> int:
        """Returns a number of the window, of `pad` the one in front."""
        return int(window[name][axis].split("_")[0]) if name in window else default

    pairs = 1
    for axis, label in enumerate(sorted(label for label in right_axes if label.isdigit())):
        stride, pad = setting("stride", axis, 1), setting("pad", axis, 0)
        left_dilation, right_dilation = setting("lhs_dilate", axis, 1), setting("rhs_dilate", axis, 1)
        last = (left[left_axes.index(label)] - 1) * left_dilation
        met = [
            o * stride + k * right_dilation - pad
            for o in range(out[out_axes.index(label)]) for k in range(right[right_axes.index(label)])
        ]
        pairs *= sum(0 <= position <= last and position % left_dilation == 0 for position in met)
    # The other axes: every output is computed from every input feature.
    outputs = math.prod(size for size, label in zip(out, out_axes, strict=True) if not label.isdigit())
    return 2 * outputs * right[right_axes.index("i")] * pairs


def _sizes(shape: str) -> list[int]:
    """Returns the sizes of a shape's first array."""
    match = _SIZES.search(shape)
    return [int(size) for size in match[1].split(",") if size] if match else []
