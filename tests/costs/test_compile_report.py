"""The compile report: its parser and sums on small programs, and real steps for machines that are not there."""

import dataclasses
import importlib.util
from collections import Counter

import pytest

from tests.helpers.stages import load_for_a_pod
from vocojax.config import ConfigError, preset
from vocojax.costs import hlo
from vocojax.costs.steps import attention
from vocojax.costs.steps.compiling import Compiled, CompilerError, Unfinished, compile_step, hbm_bytes
from vocojax.costs.steps.program import Costs, add_up
from vocojax.costs.steps.report import Device, compile_report, estimate, memory
from vocojax.costs.steps.tables import comparison, table
from vocojax.costs.topologies import Topology
from vocojax.data.config import DataConfig
from vocojax.devices import known_tpu
from vocojax.errors import MissingPackage
from vocojax.parallel.mesh import MeshConfig
from vocojax.training.config import StageConfig
from vocojax.training.flops import visible_pairs

# A loop of five turns around a gather, a product in a fusion and a kernel; behind it a reduce-scatter in disguise.
PROGRAM = """
HloModule jit_step

%fused (p0: bf16[8,16], p1: bf16[16,32]) -> bf16[8,32] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%start (q2: bf16[4,32]) -> bf16[16,32] {
  %q2 = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[16,32]{1,0} all-gather(%q2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.3 (q3: bf16[4,32]) -> bf16[16,32] {
  %q3 = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[16,32]{1,0} all-gather(%q3), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.1.clone (q4: bf16[16,32]) -> bf16[4,32] {
  %q4 = bf16[16,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[16,32]{1,0} all-reduce(%q4), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = bf16[4,32]{1,0} slice(%all-reduce.1), slice={[0:4], [0:32]}
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %part = bf16[4,32]{1,0} constant({...})
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %async-collective-start.1 = bf16[16,32]{1,0} fusion(%part), kind=kCustom, calls=%start
  %fusion.9 = bf16[16,32]{1,0} fusion(%part), kind=kCustom, calls=%async_collective_fusion.3
  %fusion.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %all-gather.1), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/decoder/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %interval_attention_forward.3 = bf16[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%part, %interval_attention_forward.3)
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

ENTRY %main (a: bf16[8,16]) -> bf16[4,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %init = (s32[], bf16[8,16]{1,0}) tuple(%a)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body
  %all-reduce-start.2 = f32[8]{0} all-reduce-start(%a), replica_groups={}, to_apply=%add
  ROOT %fusion.2 = bf16[4,32]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1.clone, metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"estimated_cycles":"70"}
}
"""  # noqa: E501


def test_loops_are_multiplied_out_and_collectives_counted_once():
    module = hlo.parse(PROGRAM)
    assert module.runs["body"] == 5 and module.runs["fused"] == 5 and module.runs["main"] == 1
    costs = add_up(module, devices=8)
    assert dict(costs.cycles) == {"decoder": 5000, "optimizer": 70, "other": 0}
    assert costs.flops == 5 * 2 * 8 * 16 * 32
    assert dict(costs.kernels) == {"interval_attention_forward": 5}
    gathered = 16 * 32 * 2  # of a gather, the whole array; of the one in pieces, only the first piece
    assert dict(costs.synchronous) == {"all-gather": 5 * gathered, "reduce-scatter": gathered}
    assert dict(costs.asynchronous) == {"all-gather": 5 * gathered, "all-reduce": 32}


def test_traffic_leaves_out_other_memories():
    """The product reads 8 x 16 and 16 x 32 from HBM; its result stays in VMEM."""
    costs = add_up(hlo.parse(PROGRAM), devices=8)
    product = [entry for entry in costs.roofline if entry[0] == "decoder"]
    assert product == [("decoder", 8192, 2 * (8 * 16 + 16 * 32), 5)]


@pytest.mark.parametrize(
    ("shape", "op"),
    [("((f32[16,32]), f32[2,32])", "reduce-scatter-start"), ("((f32[2,32]), f32[16,32])", "all-gather-start"),
     ("f32[2,32]", "reduce-scatter")],
)
def test_a_collective_counts_its_whole_array(shape, op):
    """2,048 bytes, whether its text names operand and result or the result alone."""
    text = f"""
ENTRY %main (p: f32[16,32]) -> f32[2,32] {{
  %p = f32[16,32] parameter(0)
  ROOT %c = {shape} {op}(%p), replica_groups=[1,8]<=[8]
}}
"""
    costs = add_up(hlo.parse(text), devices=8)
    assert sum((costs.synchronous + costs.asynchronous).values()) == 2048


def test_a_gpu_program_is_read_as_a_tpu_s():
    """cuBLAS computes the products, Triton the kernels; a collective may start in a computation of its own, and one
    that is said to be synchronous hides behind nothing. The update of a stack of arrays moves the update alone."""
    text = """
%gathering (g: bf16[16,64]) -> bf16[128,64] {
  %g = bf16[16,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[128,64]{1,0} all-gather(%g), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%updated (s: f32[32,64,128], u: bf16[64,128], at: s32[]) -> f32[64,32,128] {
  %s = f32[32,64,128]{2,0,1} parameter(0)
  %u = bf16[64,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %view = f32[64,32,128]{2,1,0} bitcast(%s)
  %row = bf16[64,1,128]{2,1,0} bitcast(%u)
  %wide = f32[64,1,128]{2,1,0} convert(%row)
  ROOT %dus = f32[64,32,128]{2,1,0} dynamic-update-slice(%view, %wide, %at, %at, %at)
}

ENTRY %main (a: bf16[24,64], b: bf16[64,128], p: bf16[16,64], s: f32[32,64,128], at: s32[]) -> bf16[24,128] {
  %a = bf16[24,64]{1,0} parameter(0)
  %b = bf16[64,128]{1,0} parameter(1)
  %p = bf16[16,64]{1,0} parameter(2)
  %s = f32[32,64,128]{2,0,1} parameter(3)
  %at = s32[] parameter(4)
  %all-gather-start.1 = ((bf16[16,64]{1,0}), bf16[128,64]{1,0}) async-start(%p), calls=%gathering
  %all-gather-done.1 = bf16[128,64]{1,0} async-done(%all-gather-start.1)
  %all-reduce-start.2 = f32[8]{0} all-reduce-start(%a), replica_groups={}, backend_config={"collective_backend_config":{"is_sync":true}}
  %all-reduce-done.2 = f32[8]{0} all-reduce-done(%all-reduce-start.2)
  %pallas_call.4 = bf16[24,64]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/decoder/interval_attention_dq/pallas_call"}
  %loop_dynamic_update_slice_fusion = f32[64,32,128]{2,1,0} fusion(%s, %b, %at), kind=kLoop, calls=%updated
  ROOT %custom-call.7 = (bf16[24,128]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/decoder/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501
    costs = add_up(hlo.parse(text), devices=8)
    assert costs.flops == 2 * 24 * 64 * 128
    assert dict(costs.kernels) == {"interval_attention_dq": 1}
    assert dict(costs.asynchronous) == {"all-gather": 128 * 64 * 2} and dict(costs.synchronous) == {"all-reduce": 32}
    updates = [moved for scope, _, moved, _ in costs.roofline if scope == "other"]
    assert updates == [64 * 128 * 4 + 64 * 128 * 2 + 4], "the update is read as bf16 and written as fp32"


def test_collectives_that_computation_is_too_short_to_hide():
    device = Device(16 << 30, 1e12, 1e9, interconnect=1e6, hertz=1e6)
    costs = Costs(cycles=Counter(decoder=300_000), asynchronous=Counter({"all-gather": 400_000, "all-reduce": 100_000}))
    report = estimate(costs, device, Compiled(devices=1, model_flops=1e9), tokens=1, attention_seconds=0.1)
    assert report["seconds"]["hidden_interconnect"] == pytest.approx(0.6)
    assert report["estimated_seconds"] == pytest.approx(0.6)
    assert sum(report["scope_seconds"].values()) == pytest.approx(0.6)


def test_what_slices_exchange_goes_over_the_network():
    """As libtpu writes a sum over two slices of a part of 1,048,576 bytes that each chip holds: it is sent to the hosts
    and comes back. In a ring of k slices 2 (k - 1) / k of it pass through a chip's share of the network."""
    text = """
ENTRY %main (p: f32[256,8,128]) -> f32[256,8,128] {
  %p = f32[256,8,128]{2,1,0} parameter(0)
  %t = token[] after-all()
  %send.6 = (f32[256,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%p, %t), channel_id=11, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.6 = token[] send-done(%send.6), channel_id=11, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.6 = (f32[256,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%t), channel_id=10, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv-done.6 = (f32[256,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv.6), channel_id=10
}
"""  # noqa: E501
    costs = add_up(hlo.parse(text), devices=8)
    assert dict(costs.between_slices) == {"all-reduce": 1_048_576}
    assert not costs.synchronous and not costs.asynchronous and not costs.hbm_bytes
    compiled = Compiled(devices=8, model_flops=1e9)
    for slices, seconds in ((2, 1.048576), (4, 1.572864)):
        device = Device(16 << 30, 1e12, 1e9, interconnect=1e6, hertz=1e6, network=1e6)
        report = estimate(costs, device, compiled, tokens=100, attention_seconds=0, slices=slices)
        assert report["estimated_seconds"] == pytest.approx(seconds)
        assert report["seconds"]["between_slices"] == report["scope_seconds"]["between slices"]
        assert report["between_slices_bytes"] == {"all-reduce": 1_048_576}


def test_a_chip_s_share_of_the_network():
    """Cloud TPU's pages: 6.4 and 25.6 Tbit/s for a pod of 256 v5e and v6e, 50 Gbit/s for a chip of v5p."""
    share = {"TPU v5 lite": 6.4e12 / 8 / 256, "TPU v6 lite": 25.6e12 / 8 / 256, "TPU v5": 50e9 / 8}
    assert {kind: known_tpu(kind).network for kind in share} == share
    v5p = Device.of(Topology("v5p:2x2x1*2"), Compiled(device_kind="TPU v5", cores=2))
    assert v5p.network == 6.25e9 and Topology("v5p:2x2x1*2").count == 8


def test_hbm_is_what_is_allocated_in_it():
    assignment = (
        "allocation 0: size 100, page 0, parameter 3, shape |f32[25]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 1: size 4000, page 0, thread-local:\n value: <1 x @0> (size=4000,offset=0): f32[1000]\n"
        "allocation 2: size 700, page 0, preallocated-temp:\n"
        "allocation 3: size 50, page 0, color 1, preallocated-temp:\n"
    )
    assert hbm_bytes(assignment) == 800


def test_an_estimate_adds_up():
    device = Device(memory=16 << 30, flops=1e12, bandwidth=1e9, interconnect=1e6, hertz=1e6)
    held = {"parameters": 10, "teacher": 0}
    compiled = Compiled(devices=8, device_kind="TPU v5", held=held, peak=25, model_flops=4e9)
    costs = add_up(hlo.parse(PROGRAM), devices=8)
    report = estimate(costs, device, compiled, tokens=100, attention_seconds=0.01)
    waits = (5 * 1024 + 1024) / 1e6
    assert report["estimated_from"] == "estimated_cycles"
    assert report["estimated_seconds"] == pytest.approx(0.00507 + 0.01 + waits)
    assert report["mfu_bound"] == pytest.approx(4e9 / 8 / 1e12 / report["estimated_seconds"])
    assert sum(report["scope_seconds"].values()) == pytest.approx(report["estimated_seconds"])
    assert memory(compiled, device) == {
        "fits": True, "hbm_bytes_per_device": {"parameters": 10, "temporaries": 15}, "peak_bytes": 25}
    assert not memory(dataclasses.replace(compiled, peak=17 << 30), device)["fits"]
    assert not memory(dataclasses.replace(compiled, error="RESOURCE_EXHAUSTED"), device)["fits"]


@pytest.mark.parametrize("name", [
    "v5p", "h200:8", "v5p:4x", "v5e:4x4*", "v3:2x2", "v5e:2x2*0", "v5e:0x2", "h100:0", "h100:2x4"])
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="topology must look like v5p:4x4x4"):
        Topology(name)


def test_a_stage_s_rows_have_its_shape_and_its_slots_for_targets():
    config = load_for_a_pod("voco")
    rows, causal = (attention.stage_rows(config, visibility) for visibility in ("voco", "causal"))
    assert rows.start.shape == causal.stop.shape == (attention.ROWS, 2048)
    pairs, causal_pairs = (visible_pairs(view.start, view.stop) / attention.ROWS for view in (rows, causal))
    assert pairs < causal_pairs < 2048 * 2049 / 2
    assert attention.stage_targets(config, rows) == rows.text
    data = dataclasses.replace(config.data, max_targets=100)
    assert attention.stage_targets(dataclasses.replace(config, data=data), rows) == 100


@pytest.mark.parametrize("model", ["clip_l_336_vicuna_7b", "clip_l_336_vicuna_13b"])
def test_stages_on_a_pod_have_the_released_hyper_parameters(model):
    voco, alignment = load_for_a_pod("voco", model), load_for_a_pod("alignment", model)
    assert voco.model == alignment.model == preset(model)
    assert (voco.optimizer.learning_rate, voco.optimizer.warmup_share, voco.optimizer.weight_decay) == (2e-5, 0.03, 0.0)
    assert (voco.batch_size, voco.data.row_length, voco.visibility) == (128, 2048, "voco")
    assert alignment.optimizer.learning_rate == 1e-3
    assert alignment.batch_size * alignment.data.images_per_row == 256
    assert [regex for regex, rate in alignment.learning_rates if rate != "freeze"] == ["projector/.*"]


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (extra `tpu`)")


@pytest.fixture
def tiny_stage(tiny_config) -> StageConfig:
    data = DataConfig(path="-", image_root="-", tokenizer="-", row_length=128, images_per_row=1, max_targets=16)
    return StageConfig(
        name="tiny", model=tiny_config, data=data, steps=1,
        learning_rates=(("vision/.*", "freeze"), (".*", 1.0)),
        mesh=MeshConfig(data=1, fsdp=-1), batch_size=4, attention="chunked",
    )


@pytest.mark.parametrize(("topology", "message"), [
    ("v5e:2x2", r"^compiling for v5e:2x2 needs the package libtpu, and no device: pip install -e '\.\[tpu\]'$"),
    ("h100:8", r"^compiling for h100:8 needs the package jax-cuda13-plugin, .*: pip install -e '\.\[cuda\]'$"),
])
def test_a_missing_compiler_is_named_with_its_extra(topology, message, tiny_stage, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=message):
        compile_step(tiny_stage, Topology(topology))


@needs_libtpu
@pytest.mark.parametrize(("child", "error", "message"), [
    ("kill -KILL $$", Unfinished, r"^the compiler was killed by signal 9 \(out of memory\?\): run again"),
    ("exec sleep 60", Unfinished, "^the compiler took more than 1 s"),
    ("echo '[\"mesh.fsdp\", \"must divide\"]' > $4/refused.json; exit 1", ConfigError, "^mesh.fsdp must divide$"),
    ("echo '    raise FileNotFoundError(path)'; echo 'jax.errors.JaxRuntimeError: INVALID: v5e:3x5'; exit 1",
     CompilerError, "^can't compile for v5e:2x2: jax.errors.JaxRuntimeError: INVALID: v5e:3x5$"),
    ("echo 'ERROR: Unknown command line flag'; exit 1", CompilerError, ": ERROR: Unknown command line flag$"),
    ("echo 'F1 Unknown flag in XLA_FLAGS: --no'; kill -ABRT $$", CompilerError, ": F1 Unknown flag in XLA_FLAGS: --no"),
])
def test_why_nothing_was_compiled(child, error, message, tiny_stage, tmp_path, monkeypatch):
    """A shell script in place of the child process; what it is killed by says nothing of the stage."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{child}\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(error, match=message):
        compile_step(tiny_stage, Topology("v5e:2x2"), limit=1)


@needs_libtpu
def test_a_stage_that_a_topology_refuses(tiny_stage, monkeypatch):
    with pytest.raises(ConfigError, match=r"^mesh slice x data x fsdp x tensor must multiply to the 4 devices"):
        compile_step(dataclasses.replace(tiny_stage, mesh=MeshConfig(data=3)), Topology("v5e:2x2"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(CompilerError, match=r"Unknown flag.* --xla_no_such_flag"):
        compile_step(tiny_stage, Topology("v5e:2x2"))


@needs_libtpu
def test_a_tiny_step_is_compiled_for_a_topology(tiny_stage):
    report = compile_report(tiny_stage, Topology("v5e:2x2"), fast=True)
    assert report["fits"] and not report["error"] and report["devices"] == 4
    assert report["tokens_per_device"] == 128 and report["estimated_seconds"] > 0 and 0 < report["mfu_bound"] < 1
    assert sum(report["hbm_bytes_per_device"].values()) == report["peak_bytes"] < 1 << 30
    assert report["collective_bytes"]["all-gather"] > 0
    assert "fits" in table(report) and "fsdp 4" in comparison([report])


@needs_libtpu
@pytest.mark.slow
def test_a_tiny_step_is_compiled_for_two_slices(tiny_stage):
    """Between slices go the parts of the gradient, in fp32, and a few sums."""
    stage = dataclasses.replace(tiny_stage, mesh=MeshConfig(slice=2, data=1, fsdp=-1), batch_size=8)
    report = compile_report(stage, Topology("v5e:2x2*2"), fast=True)
    assert report["devices"] == 8 and report["fits"]
    parameters = report["hbm_bytes_per_device"]["parameters"]
    assert parameters <= report["between_slices_bytes"]["all-reduce"] <= 1.05 * parameters + 16384
    assert "all-reduce, between slices" in table(report)


@needs_libtpu
def test_every_kernel_of_a_step_has_a_price():
    """Rotary positions are XLA's where their kernel does not take the heads; on keys a call costs their share. With
    `tensor`, a device's steps have fewer heads, and each of these costs more."""
    stage = load_for_a_pod("voco")
    decoder = dataclasses.replace(stage.model.decoder, num_heads=8, num_kv_heads=8)
    data = dataclasses.replace(stage.data, row_length=1024)  # smaller blocks
    of = lambda tensor=1, **changes: attention.kernel_seconds(dataclasses.replace(
        stage, data=data, mesh=MeshConfig(tensor=tensor),
        model=dataclasses.replace(stage.model, decoder=dataclasses.replace(decoder, **changes))), "v5e:4x4", 4)
    passes = {f"interval_attention_{name}" for name in ("forward", "mean", "backward")}
    whole, grouped, quarter = of(), of(num_kv_heads=2), of(tensor=4)
    assert set(whole) == {*passes, "rotary"} and min(whole.values()) > 0
    assert grouped["rotary"] == pytest.approx(whole["rotary"] * (1 + 2 / 8) / 2)
    assert quarter["interval_attention_forward"] > 1.2 * whole["interval_attention_forward"] / 4
    assert set(of(head_width=72)) == passes
