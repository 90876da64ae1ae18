"""The reader of HLO text, on small texts."""

import pytest

from vocojax.costs import hlo

CONDITIONAL = """
%yes (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%no (y: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} parameter(0)
}

ENTRY %main (p: pred[], a: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %a = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%p, %a, %a), true_computation=%yes, false_computation=%no
}
"""


def test_both_ways_of_naming_branches_are_read():
    other = CONDITIONAL.replace("true_computation=%yes, false_computation=%no", "branch_computations={%no, %yes}")
    for text, called in ((CONDITIONAL, ["yes", "no"]), (other, ["no", "yes"])):
        module = hlo.parse(text)
        (branch,) = [i for i in module.computations[module.entry] if i.op == "conditional"]
        assert branch.called == called and branch.operands == ("p", "a", "a")
        assert module.runs == {"main": 1, "yes": 1, "no": 1}


OPEN_LOOP = """
%body (x: s32[]) -> s32[] {
  ROOT %x = s32[] parameter(0)
}

%condition (y: s32[]) -> pred[] {
  %y = s32[] parameter(0)
  ROOT %less = pred[] compare(%y, %y), direction=LT
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  ROOT %w = s32[] while(%a), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(head)/while"}
}
"""


def test_turns_of_a_loop_that_depend_on_the_data_are_told_by_scope():
    assert [hlo.parse(OPEN_LOOP, loops).runs["body"] for loops in (None, {"vision": 3}, {"head": 4})] == [1, 1, 4]


def test_shapes_and_groups():
    assert hlo.array_bytes("(bf16[2,3]{1,0}, f32[4]{0:T(128)S(1)}, pred[])") == 12 + 16 + 1
    assert hlo.array_bytes("(bf16[2,3]{1,0}, f32[4]{0:T(128)S(1)})", hbm_only=True) == 12
    groups = {"replica_groups={{0,1},{2,3}}": 2, "replica_groups=[4,16]<=[64]": 16, "": 64,
              "replica_groups=mesh['a'=4,'b'=2] {'a'}": 4}
    for text, size in groups.items():
        assert hlo.group_size(hlo.Instruction("x", "", "all-gather", (), text, False), 64) == size
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")


def test_flops_of_a_convolution_skip_the_padding():
    """A batch axis written as a spatial one: of 4 x 4 pairs of positions only the 4 on the diagonal meet."""
    text = "%a, %b), window={size=4 stride=3 pad=3_3 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    product = hlo.Instruction("c", "f32[4,8,32]", "convolution", ("a", "b"), text, True)
    assert hlo.product_flops(product, {"a": "f32[4,8,16]", "b": "f32[4,16,32]"}) == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(("window", "outputs", "pairs"), [
    ("size=3 pad=1_1", 4, 3 + 4 + 3),  # the outer positions of the kernel meet padding once each
    ("size=3 pad=0_0 stride=2", 1, 1 + 1 + 1),
    ("size=3 rhs_dilate=2 pad=2_2", 4, 2 + 4 + 2),
    ("size=3 lhs_dilate=2 pad=1_1", 7, 3 + 4 + 3),  # every other position is a zero between elements
])
def test_flops_of_a_convolution_count_the_pairs_that_meet(window, outputs, pairs):
    """Four elements and a kernel of three; for each position of the kernel the outputs at which it meets an element."""
    text = f"%a, %b), window={{{window}}}, dim_labels=b0f_0io->b0f"
    product = hlo.Instruction("c", f"f32[5,{outputs},32]", "convolution", ("a", "b"), text, True)
    assert hlo.product_flops(product, {"a": "f32[5,4,16]", "b": "f32[3,16,32]"}) == 2 * 5 * 16 * 32 * pairs
