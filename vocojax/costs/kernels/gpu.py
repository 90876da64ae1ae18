"""Costs of Pallas-Triton kernels without a GPU: XLA compiles them, ptxas and nvdisasm say what came out.

For every loop that holds tensor-core work the units of a streaming multiprocessor (SM) are counted in cycles per
iteration; the busiest one bounds the loop from below. Latency, bank conflicts and the tail are not modelled, so the
bound compares kernels and does not promise a time. XLA reads where to write its dumps from an environment variable,
before it starts. So a child process compiles (`python -m vocojax.costs.kernels.gpu`).
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vocojax.costs.topologies import Topology
from vocojax.devices import GPUS, Gpu

LENGTH, HEADS, WIDTH = 2048, 32, 128
MHA_BLOCKS = (128, 64, 32)  # queries and keys of the forward pass, both of the backward pass


@dataclasses.dataclass(frozen=True)
class Loop:
    """One iteration of a loop with tensor-core work, for a whole block of threads.

    Attributes:
      tensor_flops: of its products.
      cycles: by unit of the SM.
    """

    tensor_flops: float
    cycles: dict[str, float]

    @property
    def bound(self) -> float:
        """The fewest cycles that the iteration can take: those of the busiest unit."""
        return max(self.cycles.values())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, as ptxas and nvdisasm describe it.

    Attributes:
      registers: of a thread.
      spills: bytes of registers that are stored and loaded for want of room.
      shared_bytes: shared memory of a block.
      tensor: tensor-core instructions, by kind.
      loops: the innermost ones with tensor-core work.
    """

    registers: int
    spills: int
    shared_bytes: int
    tensor: dict[str, int]
    loops: list[Loop]


def kernels(target: str, which: str) -> dict[str, Kernel]:
    """Compiles kernels in a child process.

    Args:
      target: a key of `devices.GPUS`.
      which: 'ours', or 'mha' for JAX's Pallas attention for GPUs.

    Returns:
      The kernels by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_dump_to={folder}"}
        command = [sys.executable, "-m", "vocojax.costs.kernels.gpu", target, which]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"compiling {which} for {target} failed:\n{child.stderr[-3000:]}")
        found: dict[str, Kernel] = {}
        for path in sorted(Path(folder).glob("*.ptx")):
            found |= examine(path.read_text(), GPUS[target], folder)
    return found


def examine(ptx: str, target: Gpu, folder: str) -> dict[str, Kernel]:
    """Assembles PTX and reads its kernels. Needs ptxas and nvdisasm."""
    architecture = re.search(r"\.target (\w+)", ptx)
    if not architecture or ".entry" not in ptx:
        return {}
    source, binary = f"{folder}/kernel.ptx", f"{folder}/kernel.cubin"
    Path(source).write_text(ptx)
    command = [tool("ptxas"), "-v", f"-arch={architecture[1]}", source, "-o", binary]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    listing = subprocess.run([tool("nvdisasm"), "-c", binary], capture_output=True, text=True, check=True).stdout
    code = disassembled(listing)
    found = {}
    for name, said in re.findall(r"Compiling entry function '([^']+)'.*?\n(.*?)(?=Compiling entry|\Z)", log, re.S):
        number = lambda pattern, said=said: int(m[1]) if (m := re.search(pattern, said)) else 0
        threads = re.search(rf"\.entry {re.escape(name)}\(.*?\.reqntid (\d+)", ptx, re.S)
        instructions = code[name]
        opcodes = [opcode for _, opcode, _ in instructions]
        found[name] = Kernel(
            registers=number(r"Used (\d+) registers"),
            spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            shared_bytes=number(r"(\d+) bytes smem"),
            tensor={kind: sum(o.startswith(kind) for o in opcodes) for kind in ("HGMMA", "HMMA")},
            loops=loops(instructions, int(threads[1]) // 32 if threads else 4, target),
        )
    return found


def tool(name: str) -> str:
    """Returns the path of a CUDA command-line tool, from PATH, a CUDA installation or NVIDIA's Python packages.

    Raises:
      FileNotFoundError: it is in none of them.
    """
    installed = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    installed += [path for root in sys.path for path in glob.glob(f"{glob.escape(root)}/nvidia/*/bin/{name}")]
    for path in installed:
        if path and os.path.exists(path):
            return path
    raise FileNotFoundError(f"{name} is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")


Instruction = tuple[int, str, int | None]  # address, opcode, where it branches to


def disassembled(listing: str) -> dict[str, list[Instruction]]:
    """Reads nvdisasm's listing: the instructions of every kernel."""
    code: dict[str, list[tuple[int, str, str | None]]] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    name = ""
    for line in listing.splitlines():
        if start := re.match(r"\.text\.(\S+):", line):
            name = start[1]
            code[name] = []
        elif label := re.match(r"(\.L_\S+):", line.strip()):
            waiting.append(label[1])
        elif name and (m := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line)):
            address = int(m[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            target = re.search(r"`\((\.L_\S+?)\)", m[3])
            code[name].append((address, m[2], target[1] if target else None))
    return {
        name: [(address, opcode, labels.get(target or "")) for address, opcode, target in instructions]
        for name, instructions in code.items()
    }


def loops(instructions: list[Instruction], warps: int, target: Gpu) -> list[Loop]:
    """Returns the innermost loops that hold tensor-core work, in the order of the code."""
    bodies = [
        [opcode for at, opcode, _ in instructions if head <= at <= address]
        for address, opcode, head in instructions
        if head is not None and head <= address and opcode.startswith("BRA")
    ]
    busy = [body for body in bodies if tensor_flops(body)]
    inner = [body for body in busy if not any(len(b) < len(body) and _within(b, body) for b in busy)]
    return [Loop(warps * tensor_flops(body), _cycles(body, warps, target)) for body in inner]


def _within(part: list[str], whole: list[str]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def tensor_flops(opcodes: list[str]) -> float:
    """Returns the FLOPs of one warp's tensor-core instructions.

    `HMMA.16816` multiplies 16x16 by 16x8. An `HGMMA.64xNxK` is the work of four warps.
    """
    flops = 0.0
    for opcode in opcodes:
        if m := re.match(r"HMMA\.16(8)(16|8)\b", opcode):
            flops += 2 * 16 * int(m[1]) * int(m[2])
        elif m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            flops += 2 * int(m[1]) * int(m[2]) * int(m[3]) / 4
    return flops


# Opcodes of the units that are counted by instruction.
UNITS = {
    "mufu": r"MUFU",
    "fp32": r"F(FMA|MUL|ADD|MNMX|SEL|SETP|CHK|2F)|HFMA2|HADD2|HMUL2",
    "int32": r"I(MAD|ADD|SETP|MNMX|ABS)|LOP3|SHF|LEA|PRMT|SEL|VIADD|VIMNMX",
    "shuffle": r"SHFL",
}


def _cycles(opcodes: list[str], warps: int, target: Gpu) -> dict[str, float]:
    """Returns the SM cycles of one iteration of a block of `warps` warps, by unit."""
    count = collections.Counter({unit: sum(bool(re.match(p, o)) for o in opcodes) for unit, p in UNITS.items()})
    moved = sum(_bytes(o) for o in opcodes if re.match(r"LDS|STS|LDGSTS", o))
    return {
        "tensor": warps * tensor_flops(opcodes) / target.tensor_flops,
        "issue": warps * len(opcodes) / 4,
        "mufu": warps * 32 * count["mufu"] / 16,
        "fp32": warps * 32 * count["fp32"] / target.fp32_lanes,
        "int32": warps * 32 * count["int32"] / 64,
        "shuffle": warps * count["shuffle"],
        "shared": warps * moved / 128,
    }


def _bytes(opcode: str) -> int:
    """Returns the bytes that one warp's access to shared memory moves: 8x8 matrices of 16 bits, or 32 lanes of 4, 8
    or 16 bytes."""
    if m := re.search(r"MT?88\.(\d)", opcode):
        return 128 * int(m[1])
    wide = re.search(r"\.(64|128)\b", opcode)
    return 4 * int(wide[1]) if wide else 128


def gpu_report(targets: list[str]) -> dict[str, Any]:
    """Compares the project's causal attention with JAX's `mha`: 32 heads of 128, bfloat16.

    Returns:
      `{target: {"forward" | "backward": {"ours", "mha", "ratio", "partial_ratio"}}}`. `ratio` is our bound in cycles
      per pair of a full tile over that of `mha`, `partial_ratio` that of a partial tile. Smaller is better. `mha`
      masks every tile.
    """
    from vocojax.kernels.interval_attention import gpu_blocks

    report: dict[str, Any] = {}
    for target in targets:
        ours, mha = kernels(target, "ours"), kernels(target, "mha")
        table = gpu_blocks.chosen(gpu_blocks.architecture(GPUS[target].device_kind), 2 * WIDTH)
        pairs = lambda blocks: blocks.q * blocks.k
        q, k, both = MHA_BLOCKS
        # Per kernel: the pairs of its tile, and its loops over full and over partial tiles. JAX's backward kernel has
        # a loop for dk with dv and one for dq.
        mine = {
            "forward": [("interval_attention_forward", pairs(table.forward), 0, 1)],
            "backward": [
                ("interval_attention_dq", pairs(table.dq), 0, 1),
                ("interval_attention_dkv", pairs(table.dkv), 0, 1),
            ],
        }
        other = {
            "forward": [("mha_forward", q * k, 0, 0)],
            "backward": [("mha_backward", both * both, 0, 0), ("mha_backward", both * both, 1, 1)],
        }
        report[target] = {}
        for pass_ in ("forward", "backward"):
            entry = {"ours": _entry(ours, mine[pass_]), "mha": _entry(mha, other[pass_])}
            for ratio, of in (("ratio", "cycles_per_pair"), ("partial_ratio", "partial_cycles_per_pair")):
                entry[ratio] = entry["ours"][of] / entry["mha"]["cycles_per_pair"]
            report[target][pass_] = entry
    return report


def _entry(found: dict[str, Kernel], parts: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    """Adds up kernels, each given as (name, pairs of its tile, loop over full tiles, loop over partial tiles)."""
    named = {name: found[name] for name, *_ in parts}
    return {
        "cycles_per_pair": sum(found[name].loops[full].bound / pairs for name, pairs, full, _ in parts),
        "partial_cycles_per_pair": sum(found[name].loops[partial].bound / pairs for name, pairs, _, partial in parts),
        "spills": sum(kernel.spills for kernel in named.values()),
        "kernels": {name: dataclasses.asdict(kernel) for name, kernel in named.items()},
    }


def _compile_here(target: str, which: str) -> None:
    """Does the child's part of `kernels`."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache leaves no dumps
    device = Topology(f"{target}:1").devices()[0]
    on = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16, sharding=on)
    vector = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=on)
    if which == "ours":
        from vocojax.kernels.interval_attention import IntervalMask, gpu_blocks, pallas_gpu

        options = dict(scale=WIDTH**-0.5, architecture=gpu_blocks.architecture(device.device_kind))

        def passes(q, k, v, dout, start, stop):
            mask = IntervalMask(start, stop)
            out, lse = pallas_gpu.forward(q, k, v, mask, **options)
            return out, pallas_gpu.backward(q, k, v, mask, out, lse, dout, **options)

        jax.jit(passes).lower(x, x, x, x, vector, vector).compile()
    else:
        from jax.experimental.pallas.ops.gpu import attention

        q, k, both = MHA_BLOCKS
        names = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        blocks = attention.BlockSizes(block_q=q, block_k=k, **dict.fromkeys(names, both))
        loss = lambda q, k, v, ids: attention.mha(
            q, k, v, ids, sm_scale=WIDTH**-0.5, causal=True, block_sizes=blocks
        ).sum()
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, vector).compile()


if __name__ == "__main__":
    _compile_here(*sys.argv[1:])
