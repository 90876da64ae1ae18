"""Adds up a scheduled program: cycles, FLOPs, HBM traffic, kernel calls and collectives, loops as often as they run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from vocojax.costs.hlo import Instruction, Module, array_bytes, arrays, group_size, is_product, product_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SCOPES = ("vision", "head", "optimizer", "decoder")  # `jax.named_scope`s of the step, the innermost names first
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "slice-done", "after-all", "opt-barrier", "iota", "async-done", "async-update",
    "send", "send-done", "recv", "recv-done",
}  # fmt: skip


@dataclass
class Costs:
    """What one step costs one device.

    Attributes:
      cycles: XLA's estimate for everything but kernels and collectives, by scope; empty before code is generated.
      roofline: (scope, FLOPs, HBM bytes, how often it runs) of every instruction.
      kernels: calls of Pallas kernels by name.
      synchronous: bytes that collectives inside a slice move while nothing else runs, by kind.
      asynchronous: bytes that they move while computation runs, by kind.
      waits: bytes of the synchronous ones by scope, those of a sum twice.
      between_slices: bytes of arrays that slices exchange over the data centre's network, by kind.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    roofline: list[tuple[str, float, float, int]] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    synchronous: Counter[str] = field(default_factory=Counter)
    asynchronous: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    between_slices: Counter[str] = field(default_factory=Counter)

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return sum(flops * runs for _, flops, _, runs in self.roofline)

    @property
    def hbm_bytes(self) -> float:
        """Bytes that are read from HBM and written to it."""
        return sum(moved * runs for _, _, moved, runs in self.roofline)

    def roofline_seconds(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Returns the seconds by scope if every instruction takes as long as its products or its traffic."""
        seconds: dict[str, float] = {}
        for scope, flops, moved, runs in self.roofline:
            spent = runs * max(flops / flops_per_second, moved / bytes_per_second)
            seconds[scope] = seconds.get(scope, 0.0) + spent
        return seconds


def add_up(module: Module, devices: int) -> Costs:
    """Returns the costs of a program on one of its devices."""
    costs = Costs()
    shapes = {i.name: i.shape for instructions in module.computations.values() for i in instructions}
    for name, instructions in module.computations.items():
        runs = module.runs[name]
        if not runs:
            continue
        for instruction in instructions:
            _add_collective(costs, module, name, instruction, runs, devices)
            _add_exchange(costs, instruction, runs)
            if name in module.fused or instruction.op in _NO_TRAFFIC:
                continue
            scope = scope_of(instruction, module)
            if kernel := _pallas_kernel(instruction):
                costs.kernels[kernel] += runs
            elif not _is_exchange(instruction, module):
                costs.cycles[scope] += runs * instruction.cycles
                costs.roofline.append(
                    (scope, _flops(module, instruction, shapes), _traffic(module, instruction, shapes), runs)
                )
    return costs


def scope_of(instruction: Instruction, module: Module) -> str:
    """Returns the named scope of an instruction, or of the first instruction inside it that has one."""
    inside = [i for called in instruction.called for i in module.computations.get(called, ())]
    for candidate in (instruction, *inside):
        for scope in SCOPES:
            if candidate.is_in(scope):
                return scope
    return "other"


def _pallas_kernel(instruction: Instruction) -> str:
    """Returns the name of the kernel that is called (on TPU the instruction's own), or ''."""
    if instruction.op != "custom-call":
        return ""
    if "tpu_custom_call" in instruction.text:
        return instruction.name.partition(".")[0]
    name = re.search(r"(\w+)/pallas_call$", instruction.scope)
    return name[1] if name and "__gpu$xla.gpu.triton" in instruction.text else ""


def _is_exchange(instruction: Instruction, module: Module) -> bool:
    """Returns whether it starts or ends a collective, also one in a computation of its own."""
    if instruction.op == "async-start":
        return any(_collective(i) for called in instruction.called for i in module.computations.get(called, ()))
    return bool(_collective(instruction)) or instruction.op.removesuffix("-done") in COLLECTIVES


def _collective(instruction: Instruction) -> str:
    kind = instruction.op.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _add_collective(
    costs: Costs, module: Module, computation: str, instruction: Instruction, runs: int, devices: int
) -> None:
    """Counts a collective once, by the bytes of the whole array that it gathers, reduces or exchanges.

    If XLA cut it into pieces and fused these with computation, every such fusion holds a copy: only the one in
    `async-collective-start` counts. A reduce-scatter may be written as an all-reduce inside a fusion of that name.
    """
    kind = _collective(instruction)
    if not kind:
        return
    size = group_size(instruction, devices)
    moved = array_bytes(instruction.shape)
    starts = instruction.op.endswith("-start")
    asynchronous = starts and '"is_sync":true' not in instruction.text
    is_cut = kind in ("all-gather", "reduce-scatter")  # one of operand and result is a part of the other
    if starts and kind != "all-reduce":  # the shape holds both
        moved = moved * (size / (size + 1) if is_cut else 0.5)
    elif kind == "reduce-scatter":
        moved *= size
    if computation in module.fused:
        caller = module.callers[computation]
        if "all-reduce-scatter" in computation or "all-reduce-scatter" in caller:
            kind = "reduce-scatter"
        elif caller.startswith("async-collective-start") or "-start" in caller:
            asynchronous = True
        else:
            return
    (costs.asynchronous if asynchronous else costs.synchronous)[kind] += int(runs * moved)
    if not asynchronous:
        factor = 2 if kind == "all-reduce" else 1
        costs.waits[scope_of(instruction, module)] += int(runs * moved * factor)


def _add_exchange(costs: Costs, instruction: Instruction, runs: int) -> None:
    """Counts an array that is exchanged between slices.

    libtpu leaves this to its runtime on the hosts: the program sends them an array, marked with what they have to do
    (`ALL_REDUCE`), and receives the result. Inside a slice the array is reduced or gathered before.
    """
    if instruction.op == "send" and (kind := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)):
        sent = array_bytes(arrays(instruction.shape)[0])
        costs.between_slices[kind[1].lower().replace("_", "-")] += int(runs * sent)


def _flops(module: Module, instruction: Instruction, shapes: dict[str, str]) -> float:
    if is_product(instruction):
        return product_flops(instruction, shapes)
    if instruction.op != "fusion":
        return 0
    return sum(_flops(module, i, shapes) for called in instruction.called for i in module.computations.get(called, ()))


def _traffic(module: Module, instruction: Instruction, shapes: dict[str, str]) -> float:
    """Returns the HBM bytes that an instruction reads and writes; slices of a large array count as slices."""
    body = module.computations.get(instruction.called[0], []) if instruction.op == "fusion" else [instruction]
    inner = {i.name: i for i in body}
    root = next((i for i in body if i.root), instruction)
    parts = root.operands if root.op == "tuple" else (root.name,)
    moved = 0.0
    for shape, name in zip(arrays(instruction.shape), parts, strict=False):
        while (i := inner.get(name)) and i is not instruction and i.op in ("bitcast", "convert", "copy"):
            name = i.operands[0]
        if i and i.op == "dynamic-update-slice":  # in place: what moves is the update
            shape = shapes.get(i.operands[1], "")
        moved += array_bytes(shape, hbm_only=True)
    for at, operand in enumerate(instruction.operands):
        if instruction.op in ("dynamic-slice", "slice-start", "gather"):
            continue
        if instruction.op == "dynamic-update-slice" and at == 0:
            continue
        if instruction.op != "fusion":
            moved += array_bytes(shapes.get(operand, ""), hbm_only=True)
            continue
        parameter = _parameter(body, at)
        if parameter:
            moved += _read(module, body, parameter)
    return moved


def _parameter(body: list[Instruction], number: int) -> Instruction | None:
    return next((i for i in body if i.op == "parameter" and i.text.startswith(f"{number})")), None)


def _read(module: Module, body: list[Instruction], source: Instruction) -> float:
    """Returns the bytes that a fused computation reads of one of its operands, also under another name."""
    whole, read = array_bytes(source.shape, hbm_only=True), 0.0
    for user in (i for i in body if source.name in i.operands):
        if user.op in ("dynamic-slice", "slice", "gather"):
            read += array_bytes(user.shape)
        elif user.op == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # in place: nothing of it is read
        elif user.op == "bitcast" and not user.root:
            read += _read(module, body, user)
        elif user.op == "fusion":
            inner = module.computations.get(user.called[0], [])
            inside = _parameter(inner, user.operands.index(source.name))
            read += _read(module, inner, inside) if inside else whole
        else:
            read += whole
    return min(read, whole)
