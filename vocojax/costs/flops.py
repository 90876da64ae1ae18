"""FLOPs of the matrix products in a compiled program, with loops counted as often as they run.

XLA's own `cost_analysis` counts a loop's body once, so a scan over 32 layers costs as much as one layer. `matmul_flops`
walks the optimised HLO and multiplies every body by its trip count. Elementwise work is left out, as is usual.
"""

import jax

from vocojax.costs import hlo
from vocojax.errors import VocojaxError

_UNCOUNTED = ("convolution", "custom-call", "ragged-dot")


class CannotCount(VocojaxError, ValueError):
    """The program has work whose FLOPs its text does not tell."""


def matmul_flops(program: jax.stages.Compiled) -> int:
    """Counts the FLOPs (two per multiply-add) of all matrix products that one run of the program computes.

    Of the branches of a conditional the most expensive one counts.

    Raises:
      CannotCount: a loop without a known trip count, or an operation that hides its products (a custom call).
    """
    module = hlo.parse(program.as_text() or "")
    shapes = {i.name: i.shape for instructions in module.computations.values() for i in instructions}
    counted: dict[str, int] = {}

    def total(computation: str) -> int:
        if computation not in counted:
            counted[computation] = sum(map(of_one, module.computations[computation]))
        return counted[computation]

    def of_one(instruction: hlo.Instruction) -> int:
        called = [total(name) for name in instruction.called]
        if instruction.op in _UNCOUNTED:
            raise CannotCount(f"the FLOPs of {instruction.op} in {str(instruction)[:200]!r} are not known")
        if instruction.op == "dot":
            return int(hlo.product_flops(instruction, shapes))
        if instruction.op == "while":
            if instruction.known_trips is None:
                raise CannotCount(f"how often the loop in {str(instruction)[:200]!r} runs is not known")
            return instruction.known_trips * sum(called)
        return max(called, default=0) if instruction.op == "conditional" else sum(called)

    return total(module.entry)
