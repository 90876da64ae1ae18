"""Reads XLA's optimised HLO text: instructions by computation, what they call, and how often each computation runs."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "s4": 0.5, "u4": 0.5,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|called_computations|(?:branch|true|false)_computations?)"
    r"=\{?((?:%[\w.\-]+(?:, )?)+)"
)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str  # everything behind the opening parenthesis
    root: bool

    def __str__(self) -> str:
        return f"%{self.name} = {self.shape} {self.op}({self.text}"

    @property
    def called(self) -> list[str]:
        """Names of the computations it calls."""
        return [name for group in _CALLED.findall(self.text) for name in re.findall(r"%([\w.\-]+)", group)]

    @property
    def cycles(self) -> int:
        """What XLA's TPU cost model says of it; 0 where it says nothing."""
        match = re.search(r'"estimated_cycles":"(\d{1,15})"', self.text)
        return int(match[1]) if match else 0

    @property
    def known_trips(self) -> int | None:
        """How often a while loop runs, if XLA notes it."""
        match = re.search(r'known_trip_count":\{"n":"(\d+)"', self.text)
        return int(match[1]) if match else None

    @property
    def scope(self) -> str:
        """The JAX operation it comes from, with its named scopes (`jit(step)/decoder/dot_general`), or ''."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""


@dataclass
class Module:
    """A program: its computations by name, and how often each of them runs in one execution of the program."""

    computations: dict[str, list[Instruction]]
    entry: str
    runs: Counter[str] = field(default_factory=Counter)
    fused: set[str] = field(default_factory=set)  # computations that are the inside of an instruction

    def __post_init__(self) -> None:
        self._visit(self.entry, 1)

    @functools.cached_property
    def callers(self) -> dict[str, str]:
        """The instruction that each called computation is the inside of."""
        return {called: i.name for body in self.computations.values() for i in body for called in i.called}

    def _visit(self, name: str, times: int) -> None:
        self.runs[name] += times
        for instruction in self.computations.get(name, ()):
            inner = times * (self.trips(instruction) if instruction.op == "while" else 1)
            for called in instruction.called:
                if instruction.op not in ("while", "conditional", "call"):
                    self.fused.add(called)
                self._visit(called, inner)

    def trips(self, loop: Instruction) -> int:
        """How often a while loop runs: as XLA notes, or else the largest constant of its condition."""
        if (known := loop.known_trips) is not None:
            return known
        condition = re.search(r"condition=%([\w.\-]+)", loop.text)
        constants = [
            int(number)
            for instruction in self._with_callees(condition[1] if condition else "")
            if instruction.op == "constant"
            for number in re.findall(r"^(\d+)\)", instruction.text)
        ]
        return max(constants, default=1)

    def _with_callees(self, name: str) -> Iterable[Instruction]:
        for instruction in self.computations.get(name, ()):
            yield instruction
            for called in instruction.called:
                yield from self._with_callees(called)


def parse(text: str) -> Module:
    """The module of an HLO dump (`*after_optimizations*.txt`, `*after_codegen.txt`)."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", match[5].split("), ")[0]))
            current.append(Instruction(match[2], match[3], match[4], operands, match[5], bool(match[1])))
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is no HLO dump")
    return Module(computations, entry)


def array_bytes(shape: str, *, hbm_only: bool = False) -> float:
    """Bytes of all arrays in a shape; `hbm_only` leaves out those that XLA placed in another memory."""
    return sum(
        ITEM_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes, layout in _ARRAY.findall(shape)
        if dtype in ITEM_BYTES and not (hbm_only and re.search(r"S\([1-9]", layout))
    )


def arrays(shape: str) -> list[str]:
    """The array shapes of a (tuple) shape, layouts included."""
    return [match[0] for match in _ARRAY.finditer(shape)]


def group_size(collective: Instruction, devices: int) -> int:
    """How many devices a collective spans, from its replica groups; all of them where it names none."""
    text = collective.text
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([\w.]+)'", mesh[2]))
    return devices


def is_product(instruction: Instruction) -> bool:
    """Whether it is a matrix product, also one that cuBLAS computes."""
    return instruction.op in ("dot", "convolution") or (
        instruction.op == "custom-call" and 'custom_call_target="__cublas' in instruction.text)


def product_flops(product: Instruction, shapes: dict[str, str]) -> float:
    """Multiplications and additions of a product; `shapes` are its operands'."""
    sizes = lambda shape: [int(x) for x in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if x]  # type: ignore[index]
    if len(product.operands) < 2 or any(name not in shapes for name in product.operands[:2]):
        return 0
    out, left, right = (sizes(shape) for shape in (product.shape, *(shapes[name] for name in product.operands[:2])))
    if product.op != "convolution":
        axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', product.text)
        return 2 * math.prod(out) * math.prod(left[int(x)] for x in re.findall(r"\d+", axes[1] if axes else ""))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
    if not labels:
        return 0
    left_labels, right_labels, out_labels = labels.groups()
    pairs = 1.0
    settings = re.findall(r"(lhs_dilate|rhs_dilate|stride|pad)=([\dx_\-]+)", product.text)
    window = {key: value.split("x") for key, value in settings}
    for at, label in enumerate(sorted(x for x in right_labels if x.isdigit())):
        number = lambda key, default, at=at: int(window.get(key, [default] * 9)[at].split("_")[0])
        stride, spread, step, pad = (number("stride", "1"), number("lhs_dilate", "1"), number("rhs_dilate", "1"),
                                     number("pad", "0"))
        length = (left[left_labels.index(label)] - 1) * spread
        # Batch axes are spatial ones on TPU, of which most pairs lie in the padding.
        reached = lambda o, k, s=stride, d=step, p=pad: o * s + k * d - p
        outs, kernels = out[out_labels.index(label)], right[right_labels.index(label)]
        pairs *= sum(
            0 <= reached(o, k) <= length and reached(o, k) % spread == 0 for o in range(outs) for k in range(kernels)
        )
    free = math.prod(size for size, label in zip(out, out_labels, strict=True) if not label.isdigit())
    return 2 * free * right[right_labels.index("i")] * pairs
