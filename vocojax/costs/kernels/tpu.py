"""Cycles of Pallas TPU kernels without a TPU: libtpu compiles them, `bundles` replays what it emitted.

libtpu reads where to write its dumps from an environment variable, before it loads. So a child process compiles
(`python -m vocojax.costs.kernels.tpu`), one per topology.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vocojax.costs.kernels import bundles
from vocojax.costs.kernels.bundles import GridLoop, Region
from vocojax.costs.topologies import DEVICELESS, Topology
from vocojax.devices import known_tpu


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile for one shape.

    Splash attention is compiled as causal with segment ids. It takes a mask as an array too, but only one that is known
    when the program is built. It refuses an argument of a jitted function, as the mask of a packed batch is.

    Attributes:
      kernel: the project's attention (`ours`, with the blocks of its table), its `rotary` positions, or JAX's `splash`.
      length: tokens of a row.
      rows: of the batch.
      heads: of queries, keys and values alike.
      width: of a head.
      block: queries and keys of a tile of splash.
      block_compute: keys of one of its inner steps; 0 for all of a tile.
    """

    kernel: str
    length: int
    rows: int = 1
    heads: int = 32
    width: int = 128
    block: int = 0
    block_compute: int = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled Pallas kernel of a job.

    Attributes:
      name: of the kernel.
      device_kind: what it is compiled for.
      cores: TensorCores of that device.
      parallel: whether the cores share the grid.
      steps: of the grid; 0 where the running program decides.
      moved: bytes of all operands and results.
      bundles: path of the dump of its code.
      allocations: path of the dump that lists its memory.
    """

    name: str
    device_kind: str
    cores: int
    parallel: bool
    steps: int
    moved: int
    bundles: str
    allocations: str


@dataclasses.dataclass(frozen=True)
class TileCosts:
    """Cycles of a kernel's grid step, by what the step does.

    Attributes:
      idle: a step that computes nothing.
      tiles: steps that compute, one number per region with matrix products, in the order of the code.
      before: extra cycles of the regions without products that come before those.
      after: extra cycles of the regions without products that come after those.
      matrix: cycles that the matrix units are busy in each of `tiles`.
      spills: registers stored to memory for want of room in each of `tiles`.
      vmem_bytes: VMEM of windows and scratch.
    """

    idle: int
    tiles: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    matrix: tuple[float, ...]
    spills: tuple[int, ...]
    vmem_bytes: int


def compile_jobs(topology: str, jobs: list[Job], folder: str) -> list[dict[str, Compiled]]:
    """Compiles jobs in a child process.

    Args:
      topology: its first device is compiled for.
      jobs: what to compile.
      folder: where the dumps go; it has to stay until they are read.

    Returns:
      The kernels of every job by name, in the order of their calls (forward first).
    """
    arguments = [sys.executable, "-m", "vocojax.costs.kernels.tpu", topology, folder]
    flags = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=(final_bundles|original)"
    environment = {
        **os.environ,
        **DEVICELESS,
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} {flags}",
    }
    text = json.dumps([dataclasses.asdict(job) for job in jobs])
    child = subprocess.run(arguments, input=text, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"compiling for {topology} failed:\n{child.stderr[-3000:]}")
    answer = json.loads(child.stdout.splitlines()[-1])
    return [{kernel["name"]: Compiled(**kernel) for kernel in job} for job in answer]


def tile_costs(kernel: Compiled) -> TileCosts:
    """Replays the grid step of a compiled kernel with and without each of its `pl.when` regions."""
    loop = _grid_loop(kernel)
    # Regions of a few vector operations are the pipeline's own bookkeeping and always run.
    optional = [r for r in loop.regions if r.matmuls or r.vector_ops >= 16]
    encloses = lambda r, s: r.branch < s.branch < r.end
    products = [r for r in optional if r.matmuls and not any(encloses(r, s) for s in optional if s.matmuls)]
    others = [r for r in optional if not r.matmuls]
    with_only = lambda *kept: {r for r in optional if not any(r == k or encloses(r, k) for k in kept)}
    tiles = [loop.step(with_only(r)) for r in products]
    cycles = [bundles.replay(path, loop.machine) for path in tiles]
    extra: Callable[[Region], int] = lambda r: loop.cycles(with_only(products[0], r)) - cycles[0]
    original = Path(kernel.allocations).read_text(errors="replace")
    sizes = re.findall(r"#allocation(\d+) \[shape.*?space=vmem, size = (0x[0-9a-f]+)", original)
    return TileCosts(
        idle=loop.cycles(set(optional)),
        tiles=tuple(cycles),
        before=tuple(extra(r) for r in others if r.branch < products[0].branch),
        after=tuple(extra(r) for r in others if r.branch > products[0].branch),
        matrix=tuple(bundles.matrix_cycles(path, loop.machine) for path in tiles),
        spills=tuple(sum(b.spills for b in path) for path in tiles),
        vmem_bytes=sum(dict((name, int(size, 16)) for name, size in sizes).values()),
    )


def streaming_seconds(kernel: Compiled) -> float:
    """Returns the seconds of a kernel that passes once over its operands: by its code or by the bytes it moves,
    whichever takes longer."""
    chip = known_tpu(kernel.device_kind)
    cores = kernel.cores if kernel.parallel else 1
    by_code = kernel.steps * _grid_loop(kernel).cycles(set()) / cores / chip.ghz / 1e9
    return max(by_code, kernel.moved / (chip.bandwidth * cores / chip.cores))


def _grid_loop(kernel: Compiled) -> GridLoop:
    code = Path(kernel.bundles).read_text(errors="replace")
    return GridLoop(bundles.parse(code), known_tpu(kernel.device_kind).machine)


def _compile_here(topology: str, folder: str, jobs: list[Job]) -> list[list[Compiled]]:
    """Does the child's part of `compile_jobs`."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache leaves no dumps
    device = Topology(topology).devices()[0]
    on = jax.sharding.SingleDeviceSharding(device)
    compiled = []
    for job in jobs:
        made = {"ours": _ours, "rotary": _rotary, "splash": _splash}[job.kernel]
        function, shapes = made(job, device.device_kind)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), shapes)
        calls = _pallas_calls(jax.jit(function).trace(*arguments).jaxpr.jaxpr)
        compiled.append([_compile_call(call, device, folder) for call in calls])
    return compiled


def _compile_call(call: Any, device: Any, folder: str) -> Compiled:
    """Compiles one `pallas_call` equation alone. Its dumps are the files that appear meanwhile."""
    import jax

    name = re.sub(r"\W", "_", call.params["name"])
    on = jax.sharding.SingleDeviceSharding(device)
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=on) for v in call.invars]
    function = lambda *x: call.primitive.bind(*x, **call.params)
    function.__name__ = name
    before = set(glob.glob(f"{glob.escape(folder)}/*"))
    jax.jit(function).lower(*operands).compile()
    new = [f for f in sorted(set(glob.glob(f"{glob.escape(folder)}/*")) - before) if f"-{name}" in f]
    dump = lambda end: next(f for f in new if f.endswith(end) and "schedule-" not in f)
    semantics = [str(s).lower() for s in getattr(call.params["compiler_params"], "dimension_semantics", None) or ()]
    return Compiled(
        name=name,
        device_kind=device.device_kind,
        cores=getattr(device, "num_cores", 1) or 1,
        parallel=any("parallel" in s for s in semantics),
        steps=math.prod(size if isinstance(size, int) else 0 for size in call.params["grid_mapping"].grid),
        moved=sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars)),
        bundles=dump("-final_bundles.txt"),
        allocations=dump("-original.txt"),
    )


def _pallas_calls(jaxpr: Any) -> list[Any]:
    """Returns every `pallas_call` equation in a program, in order."""
    calls = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            calls.append(equation)
            continue
        inner = [x for p in equation.params.values() for x in (p if isinstance(p, (tuple, list)) else (p,))]
        for x in inner:
            x = getattr(x, "jaxpr", x)
            calls += _pallas_calls(x) if hasattr(x, "eqns") else []
    return calls


def _ours(job: Job, device_kind: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns both passes of the project's attention, and abstract arguments."""
    import jax
    import jax.numpy as jnp

    from vocojax.kernels.interval_attention import IntervalMask, pallas_tpu, tpu_blocks

    generation = tpu_blocks.generation(device_kind)
    x = jax.ShapeDtypeStruct((job.rows, job.length, job.heads, job.width), jnp.bfloat16)
    vector: Any = jax.ShapeDtypeStruct((job.rows, job.length), jnp.int32)
    lse = jax.ShapeDtypeStruct((job.rows, job.heads, job.length), jnp.float32)

    def passes(q, k, v, mask, out, lse, dout):
        scale = job.width**-0.5
        forward = pallas_tpu.forward(q, k, v, mask, scale, generation=generation)
        backward = pallas_tpu.backward(q, k, v, mask, out, lse, dout, scale, generation=generation)
        return forward, backward

    return passes, (x, x, x, IntervalMask(vector, vector), x, lse, x)


def _rotary(job: Job, device_kind: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the project's rotary kernel, and abstract arguments."""
    import jax
    import jax.numpy as jnp

    from vocojax.kernels.rotary import pallas_tpu

    del device_kind  # it is the same for all
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((job.rows, job.length, *shape), dtype)
    table = array(jnp.float32, job.width)
    return pallas_tpu.rotate, (array(jnp.bfloat16, job.heads, job.width), table, table)


def _splash(job: Job, device_kind: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns JAX's splash attention with its fused backward pass, and abstract arguments."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del device_kind  # it has one implementation for all
    tiles: dict[str, Any] = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), job.block)
    tiles |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), job.block_compute or job.block)
    mask = masks.MultiHeadMask([masks.CausalMask((job.length, job.length))] * job.heads)
    sizes = kernel.BlockSizes(**tiles, use_fused_bwd_kernel=True)
    attend = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def loss(q, k, v, segments):
        ids = kernel.SegmentIds(segments, segments)
        return jax.vmap(attend)(q, k, v, ids).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((1, job.heads, job.length, job.width), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, job.length), jnp.int32)
    return jax.grad(loss, argnums=(0, 1, 2)), (x, x, x, segments)


if __name__ == "__main__":
    where, dumps = sys.argv[1:]
    work = [Job(**job) for job in json.load(sys.stdin)]
    print(json.dumps([[dataclasses.asdict(k) for k in job] for job in _compile_here(where, dumps, work)]))
