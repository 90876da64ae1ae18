"""TPU machine code as libtpu dumps it: VLIW bundles, their control flow, and a replay that counts cycles.

A bundle issues in one cycle, unless a unit that it needs is busy or a result that it pops is not there yet. The replay
walks bundles in order and models those stalls only: the matrix units (MXU), the transpose/reduce units (XLU) and the
transcendental unit (EUP). Memory is not modelled; the compiler schedules loads from VMEM.
"""

from __future__ import annotations

import collections
import dataclasses
import re

from vocojax.devices import Machine

DELAY_SLOTS = 4  # bundles after a branch that are executed whether it is taken or not


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One issue slot.

    Attributes:
      ops: its opcodes.
      branches: (whether it is conditional, the bundle it jumps to) of each.
      spills: registers that are stored to VMEM for want of room.
      fills: registers that are read back.
    """

    ops: tuple[str, ...]
    branches: tuple[tuple[bool, int], ...]
    spills: int
    fills: int


@dataclasses.dataclass(frozen=True)
class Region:
    """The body of a `pl.when` inside the grid loop: bundles `[branch + 1 + delay slots, end)`.

    Attributes:
      branch: the bundle that jumps over the body.
      end: the first bundle after the body.
      matmuls: matrix products inside.
      vector_ops: vector operations inside.
    """

    branch: int
    end: int
    matmuls: int
    vector_ops: int


# The first line of a bundle: its address, notes in capitals (`LB:`, `PF:`), and the opening brace.
_HEAD = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2},?\s*)*:[> ]*\{")
# An operation of a bundle: a predicate, a result, then the opcode, which is captured.
_OPCODE = re.compile(r"[\s{]*(?:\(%?\w+\)\s*)?(?:%\w+\s*=\s*)?([a-z][a-z_0-9.]*)")
# A branch: its predicate, if it has one, and the region that it jumps to.
_BRANCH = re.compile(r"sbr\.rel(?: \((!?%\w+)\))? target = \$region(\d+)")
# Opcodes of the transcendental unit.
_EUP = re.compile(r"v(exp2|rcp|log2|pow2|tanh|rsqrt|erf|sin|cos)\b")
# The unit that an opcode ends with, and its number (`vmatmul.bf16.gmra.mxu0`).
_UNIT = re.compile(r"\.(mxu|xlu|mrb)(\d?)")


def parse(text: str) -> list[Bundle]:
    """Returns the bundles of a `*-final_bundles.txt` dump."""
    texts: list[str] = []
    for line in text.splitlines():
        if _HEAD.match(line):
            texts.append(line[line.index("{") :])
        elif texts:
            texts[-1] += line
    starts: dict[str, int] = {}
    for index, body in enumerate(texts):
        for comment in re.findall(r"/\*([^*]*)\*/", body):
            for name in re.findall(r"Start(?:/End empty)? region (\d+)", comment):
                starts.setdefault(name, index)

    def bundle(body: str) -> Bundle:
        code = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
        ops = [match[1] for part in code.split(";;") if (match := _OPCODE.match(part))]
        jumps = [(bool(condition), starts[name]) for condition, name in _BRANCH.findall(body) if name in starts]
        spills, fills = (len(re.findall(rf"= {op} \[vmem:\[#allocation\d+_spill", code)) for op in ("vst", "vld"))
        return Bundle(tuple(ops), tuple(jumps), spills, fills)

    return [bundle(body) for body in texts]


class GridLoop:
    """The grid loop of a kernel: its bundles, its regions, and the cost of a step that runs some of them."""

    def __init__(self, bundles: list[Bundle], machine: Machine):
        self.bundles, self.machine = bundles, machine
        backward = [(target, at) for at, b in enumerate(bundles) for _, target in b.branches if target <= at]
        widest = max(backward, key=lambda loop: loop[1] - loop[0], default=(0, len(bundles) - 1 - DELAY_SLOTS))
        self.head, self.tail = widest
        if any(self.head < head and at < self.tail for head, at in backward):
            raise ValueError("the grid step has a loop of its own, and the code does not say how often it runs")
        self.regions = [
            self._region(at, target)
            for at in range(self.head, self.tail)
            for conditional, target in bundles[at].branches
            if conditional and target > at
        ]

    def _region(self, branch: int, end: int) -> Region:
        body = [op for b in self.bundles[branch + 1 + DELAY_SLOTS : end] for op in b.ops]
        matmuls = sum(op.startswith("vmatmul") for op in body)
        vector = sum(op[0] == "v" and not op.startswith(("vnop", "vsyn", "vpush")) for op in body)
        return Region(branch, end, matmuls, vector)

    def step(self, skipped: set[Region]) -> list[Bundle]:
        """Returns the bundles that one grid step executes when it jumps over `skipped`."""
        over = {region.branch for region in skipped}
        path: list[Bundle] = []
        at = self.head
        while at <= min(self.tail + DELAY_SLOTS, len(self.bundles) - 1):
            path.append(self.bundles[at])
            following = at + 1
            for conditional, target in self.bundles[at].branches:
                if target > at and (not conditional or at in over):
                    path += self.bundles[at + 1 : at + 1 + DELAY_SLOTS]
                    following = target
            at = following
        return path

    def cycles(self, skipped: set[Region]) -> int:
        """Returns the steady-state cycles of such a step."""
        return replay(self.step(skipped), self.machine)


def replay(path: list[Bundle], machine: Machine, passes: int = 3) -> int:
    """Returns the cycles of the last of several passes over a sequence of bundles, stalls included."""
    free: dict[str, int] = collections.defaultdict(int)
    results: dict[str, collections.deque[int]] = collections.defaultdict(collections.deque)
    decoded = [[(op, _unit(op)) for op in b.ops if op[0] == "v"] for b in path]
    products = sum(1 if ".f32" in op else 2 for ops in decoded for op, _ in ops if op.startswith("vmatmul"))
    popped = sum(op.startswith("vpop.f32.mr") for ops in decoded for op, _ in ops)
    pops_per_half = popped / max(products, 1)
    now = began = 0
    for _ in range(passes):
        began = now
        for ops in decoded:
            now = max([now, *(_ready(op, unit, free, results) for op, unit in ops)])
            for op, unit in ops:
                _issue(op, unit, now, machine, pops_per_half, free, results)
            now += 1
    return now - began


def matrix_cycles(path: list[Bundle], machine: Machine) -> float:
    """Returns the cycles that the matrix units are busy with a sequence of bundles, spread evenly over them."""
    products = [op for b in path for op in b.ops if op.startswith("vmatmul")]
    wide = sum(".f32" in op for op in products)
    return (wide * machine.matmul_f32 + (len(products) - wide) * machine.matmul_bf16) / machine.mxus


def _unit(op: str) -> str:
    match = _UNIT.search(op)
    return match[1] + match[2] if match else ""


def _ready(op: str, unit: str, free: dict[str, int], results: dict[str, collections.deque[int]]) -> int:
    """Returns the first cycle at which the unit can take the op, or at which the result that it pops is there."""
    if op.startswith("vmatmul"):
        return max(free[unit], free["push " + unit] if "vlgmr" in op else 0)
    if op.startswith("vmatpush"):
        return free["push " + unit]
    if op.startswith("vpop"):
        queue = results[unit or "eup"]
        return queue.popleft() if queue and (unit or op.startswith("vpop.e")) else 0
    return free[unit] if unit.startswith("xlu") else 0


def _issue(
    op: str,
    unit: str,
    now: int,
    machine: Machine,
    pops_per_half: float,
    free: dict[str, int],
    results: dict[str, collections.deque[int]],
) -> None:
    """Occupies the op's unit and queues its results."""
    if op.startswith("vmatmul"):
        wide = ".f32" in op
        free[unit] = now + (machine.matmul_f32 if wide else machine.matmul_bf16)
        pops = round((1 if wide else 2) * pops_per_half)
        late = lambda n: 0 if wide or n < pops / 2 else machine.second_half
        results[unit].extend(now + machine.result + late(n) for n in range(pops))
    elif op.startswith("vmatpush"):
        cost = machine.push_bf16 if "bf16" in op else machine.push_f32
        free["push " + unit] = max(free["push " + unit], now) + cost
    elif unit.startswith("xlu") and not op.startswith("vpop"):
        registers = 2 if ".binary" in op else 1  # of 16-bit numbers, two are transposed at once
        free[unit] = now + registers * machine.xlu
        results[unit].extend([now + machine.xlu_result] * registers)
    elif _EUP.match(op):
        results["eup"].append(now + machine.eup_result)
