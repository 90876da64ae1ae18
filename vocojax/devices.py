"""The table of chips: what their makers' documents say of TPUs and GPUs, by generation and by JAX's `device_kind`.

Nothing else in the package holds such a figure. Block sizes of the kernels are choices, not facts: they are in
`kernels`, under the names of this table. Nothing here needs JAX.
"""

import re
from dataclasses import dataclass

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Machine:
    """Cycles of a TensorCore's units, as libtpu's own scheduler assumes them.

    Attributes:
      matmul_bf16: a matrix unit (MXU) is busy with one `vmatmul` of packed bfloat16 rows.
      matmul_f32: the same of float32 rows.
      push_bf16: it is busy with one `vmatpush`, which loads the stationary operand, of bfloat16.
      push_f32: the same of float32.
      result: until a product can be popped.
      second_half: how much later the second half of a product can be popped.
      xlu: a transpose/reduce unit (XLU) is busy with one operation.
      xlu_result: until its result can be popped.
      eup_result: until a transcendental's result can be popped.
      mxus: matrix units per core.
    """

    matmul_bf16: int
    matmul_f32: int
    push_bf16: int
    push_f32: int
    result: int
    second_half: int
    xlu: int
    xlu_result: int
    eup_result: int
    mxus: int


V5_MACHINE = Machine(16, 8, 4, 2, 125, 7, 9, 115, 8, mxus=4)  # v4 and v5e have the layout of v5p's units
V6_MACHINE = Machine(8, 4, 4, 2, 192, 0, 4, 137, 13, mxus=2)


@dataclass(frozen=True)
class Tpu:
    """A TPU chip.

    Attributes:
      generation: its name in topologies (`v5e:4x4`).
      device_kinds: its names in JAX. A topology that is compiled for has the first one.
      cores: TensorCores per chip. From v4 on JAX shows a chip as one device, unless it is split.
      ghz: clock.
      flops: peak bfloat16 FLOP/s of a chip.
      bandwidth: HBM bytes per second of a chip.
      memory: HBM bytes that libtpu leaves to a program, as it reports them where a program does not fit.
      interconnect: bytes per second that a chip gets from a collective over a whole torus.
      network: bytes per second between a chip and other slices, its share of the data centre's network. Cloud TPU's
        pages say 6.4 Tbit/s for the 256 chips of v5e, 25.6 for those of v6e, and 50 Gbit/s for a chip of v5p. They say
        nothing of v4, which has as many chips per host as v5p and is taken to have the same.
      machine: the cycles of a core's units.
    """

    generation: str
    device_kinds: tuple[str, ...]
    cores: int
    ghz: float
    flops: float
    bandwidth: float
    memory: int
    interconnect: float
    network: float
    machine: Machine


TPUS = {chip.generation: chip for chip in (
    Tpu("v4", ("TPU v4",), 2, 1.05, 275e12, 1228e9, int(30.75 * GIB), 270e9, 6.25e9, V5_MACHINE),
    Tpu("v5e", ("TPU v5 lite", "TPU v5e"), 1, 1.50, 197e12, 819e9, int(15.75 * GIB), 180e9, 3.125e9, V5_MACHINE),
    Tpu("v5p", ("TPU v5", "TPU v5p"), 2, 1.75, 459e12, 2765e9, int(95.73 * GIB), 540e9, 6.25e9, V5_MACHINE),
    Tpu("v6e", ("TPU v6 lite", "TPU v6e"), 1, 1.75, 918e12, 1640e9, int(31.24 * GIB), 360e9, 12.5e9, V6_MACHINE),
)}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be compiled for without one.

    Attributes:
      device_kind: its name in JAX.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors (SM).
      ghz: boost clock.
      bandwidth: HBM bytes per second.
      memory: HBM bytes.
      l2: bytes of the cache.
      shared: bytes of an SM's shared memory.
      shared_per_block: the most of them that one block may ask for.
      tensor_flops: dense bfloat16 FLOPs of an SM's tensor cores per cycle.
      fp32_lanes: float32 operations of an SM per cycle.
      interconnect: bytes per second that it sends over NVLink.
    """

    device_kind: str
    capability: tuple[int, int]
    cores: int
    ghz: float
    bandwidth: int
    memory: int
    l2: int
    shared: int
    shared_per_block: int
    tensor_flops: int
    fp32_lanes: int
    interconnect: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2_039_000_000_000, 80 * GIB, 40 * MIB, 167936, 166912, 2048,
                64, 300e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 3_352_000_000_000, 80 * GIB, 50 * MIB, 233472, 232448, 4096,
                128, 450e9),
}

# Generations that libtpu compiles for, and of whose units no cycles are known: no report can be made. Cloud TPU's page
# says 2,307 TFLOP/s for a TPU7x chip, which JAX shows as two devices.
WITHOUT_CYCLES = {"tpu7x": ("TPU7x", 2307e12 / 2)}

# Peak dense bfloat16 FLOP/s of the boards by their names in JAX; the first match counts. An H100 in a PCIe slot has
# fewer cores than an SXM module, the NVL pair has a lower clock.
_GPU_PEAKS = (
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100.*PCIe.*", 756e12),
    (r"NVIDIA H[12]00 NVL.*", 835e12),
    (r"NVIDIA G?H[12]00.*", 989e12),
)


def tpu(device_kind: str) -> Tpu | None:
    """Returns the TPU with that name in JAX, None if the table has none."""
    return next((chip for chip in TPUS.values() if device_kind in chip.device_kinds), None)


def known_tpu(device_kind: str) -> Tpu:
    """Returns the TPU with that name in JAX.

    Raises:
      KeyError: the table has none.
    """
    if chip := tpu(device_kind):
        return chip
    raise KeyError(f"{device_kind!r} is no TPU of vocojax/devices.py: add it there")


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a device, None if the table does not have it."""
    if chip := tpu(device_kind):
        return chip.flops
    if peak := next((peak for kind, peak in WITHOUT_CYCLES.values() if kind == device_kind), None):
        return peak
    return next((peak for pattern, peak in _GPU_PEAKS if re.fullmatch(pattern, device_kind)), None)


def is_hopper(device_kind: str) -> bool:
    """Returns whether a GPU with that name in JAX is of NVIDIA's Hopper architecture."""
    return any(name in device_kind for name in ("H100", "H200", "GH200"))
