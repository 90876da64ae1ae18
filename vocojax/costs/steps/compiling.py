"""Compiles a stage's step for a machine that is not there, in a child process, and keeps what XLA writes about it.

libtpu and XLA read where to write their dumps before they load, so a child process compiles
(`python -m vocojax.costs.steps.compiling`). With `fast` it is stopped as soon as the scheduled program and its memory
are on disk: seconds instead of the minutes that code generation takes. Compiler flags are those of the environment
(`launch/xla_flags.sh`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vocojax.config import ConfigError, config_to_dict
from vocojax.costs.topologies import DEVICELESS, Topology
from vocojax.errors import MissingPackage, VocojaxError
from vocojax.files import write_atomically
from vocojax.training.config import StageConfig, stage_config


class CompilerError(VocojaxError, RuntimeError):
    """The compiler can't be used: no libtpu, an unknown flag, or a topology that it does not know."""


class Unfinished(VocojaxError, RuntimeError):
    """The compiler was killed or timed out; nothing is known about the program."""


@dataclass
class Compiled:
    """A compiled step, as far as the compiler came.

    Attributes:
      devices: how many.
      device_kind: of one of them.
      cores: of one of them.
      held: bytes on one of them by kind (parameters and so on), without temporaries.
      model_flops: of a step on all devices, as `flops.StepFlops` counts them, with the images, targets and visible
        pairs of typical rows. Rows count as full, padding included, as in tokens per second.
      hlo: the scheduled program, with `estimated_cycles` if code was generated.
      peak: bytes of HBM, by XLA's buffer assignment; None with an `error` where the compiler gave up.
      error: what it said then.
      cpu_seconds: of the compiler.
      memory_gib: of the compiler, at its peak.
    """

    devices: int = 0
    device_kind: str = ""
    cores: int = 1
    held: dict[str, int] = field(default_factory=dict)
    model_flops: float = 0.0
    hlo: str = ""
    peak: int | None = None
    error: str = ""
    cpu_seconds: float = 0.0
    memory_gib: float = 0.0


def compile_step(config: StageConfig, topology: Topology, *, fast: bool = False, limit: float = 1800) -> Compiled:
    """Compiles the step of a stage.

    Args:
      config: the stage.
      topology: the machine.
      fast: stop at the scheduled program (TPU only; GPU programs are complete in seconds).
      limit: seconds after which the compiler is stopped.

    Raises:
      ConfigError: the config does not go with the topology.
      MissingPackage: the compiler is not installed.
      CompilerError: the compiler can't be used.
      Unfinished: the compiler was killed or timed out.
    """
    _require_compiler(topology)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_to_dict(config)))
        flags = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
        if topology.is_gpu:
            flags += " --xla_gpu_enable_triton_gemm=false"  # its tiles are chosen by timing them on a device
        environment = {
            **os.environ,
            **DEVICELESS,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        }
        command = [sys.executable, "-m", "vocojax.costs.steps.compiling", topology.name, folder]
        with open(f"{folder}/log", "w") as log:
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                stopped = _has_to_be_stopped(child, Path(folder), fast and not topology.is_gpu, limit)
            finally:  # also if this process is interrupted
                child.kill()
                child.wait()
        status = 0 if stopped else child.returncode
        errors = _errors(Path(folder, "log").read_text(errors="replace"))
        if status < 0 and status != -signal.SIGABRT:  # which is how XLA ends itself
            raise Unfinished(f"the compiler was killed by signal {-status} (out of memory?): run again")
        if (refused := Path(folder, "refused.json")).exists():
            raise ConfigError(*json.loads(refused.read_text()))
        answer = Path(folder, "answer.json")
        compiled = Compiled(**json.loads(answer.read_text())) if answer.exists() else Compiled()
        compiled.error = errors if status else ""
        _read_dumps(compiled, Path(folder, "dump"))
        if stopped and not compiled.hlo:
            raise Unfinished(f"the compiler took more than {limit:.0f} s: run again on an idle machine")
        if not compiled.devices:
            raise CompilerError(f"can't compile for {topology.name}: {errors}")
        return compiled


def _require_compiler(topology: Topology) -> None:
    """Raises `MissingPackage` if there is no compiler for the machine; JAX's own error names no extra."""
    package, extra = ("jax_cuda13_plugin", "cuda") if topology.is_gpu else ("libtpu", "tpu")
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(f"compiling for {topology.name} needs the package {package.replace('_', '-')}, and no "
                             f"device: pip install -e '.[{extra}]'")


def _has_to_be_stopped(child: subprocess.Popen[bytes], folder: Path, fast: bool, limit: float) -> bool:
    """Waits for the child. Returns True if what is wanted is there before it ends, or if it takes too long."""
    began = time.monotonic()
    while child.poll() is None:
        reports = list(folder.glob("dump/*buffer-assignment.txt"))
        scheduled = list(folder.glob("dump/*after_optimizations_after_buffer_assignment.txt"))
        done = fast and reports and scheduled and time.time() - max(p.stat().st_mtime for p in scheduled + reports) > 2
        if done or time.monotonic() - began > limit:
            return True
        time.sleep(0.25)
    return False


def _read_dumps(compiled: Compiled, dump: Path) -> None:
    for stage in ("after_codegen", "after_optimizations_after_buffer_assignment", "gpu_after_optimizations"):
        if found := [path for path in sorted(dump.glob(f"*{stage}.txt")) if ".cpu_" not in path.name]:
            compiled.hlo = found[0].read_text(errors="replace")
            break
    for path in dump.glob("*after_optimizations-buffer-assignment.txt"):
        if ".cpu_" not in path.name:
            compiled.peak = compiled.peak or hbm_bytes(path.read_text(errors="replace"))


def hbm_bytes(assignment: str) -> int:
    """Returns the bytes of HBM that a program takes, from XLA's buffer assignment.

    Allocations in other memories (which have a color) do not count, nor do those inside fusions (thread-local), whose
    values are never stored.
    """
    allocations = re.findall(r"^allocation \d+: size (\d+),([^\n]*):$", assignment, re.M)
    return sum(int(size) for size, kind in allocations if "thread-local" not in kind and "color" not in kind)


def _errors(log: str) -> str:
    """Returns what a log says went wrong: the exception without its traceback, or else what looks like an error."""
    lines = re.findall(r"^[\w.]+(?:Error|Exception): .*$", log, re.M)[-1:] or re.findall(
        r"^.*(?:Error|ERROR|EXHAUSTED|xceeded|Check failed|Unknown).*$", log, re.M)[-3:]
    return " | ".join(line.strip() for line in lines)[:1500] or log[-600:]


def _compile_here(topology: Topology, folder: str) -> None:
    """Does the child's part of `compile_step`."""
    import jax

    from vocojax.costs.steps.attention import row_counts
    from vocojax.parallel.mesh import make_mesh
    from vocojax.training.flops import StepFlops
    from vocojax.training.program import make_program

    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache leaves no dumps
    config = stage_config(json.loads(Path(folder, "config.json").read_text()))
    jax.devices()  # reads XLA's flags: with an unknown one this process ends here, before it writes an answer
    devices = topology.devices()
    try:
        mesh = make_mesh(config.mesh, devices)
        program = make_program(config, mesh)
    except ConfigError as error:
        write_atomically(Path(folder, "refused.json"), json.dumps([error.key, error.problem]))
        raise
    state = program.abstract_state
    kinds = {"parameters": state.trained, "optimizer": state.optimizer, "averages": state.ema, "frozen": state.frozen,
             "teacher": state.teacher, "batch": program.abstract_batch}
    held = {kind: sum(_bytes_held(leaf) for leaf in jax.tree.leaves(tree)) for kind, tree in kinds.items()}
    per_row = StepFlops(config.model, state).total(**row_counts(config)._asdict())
    cores = getattr(devices[0], "num_cores", 1) or 1
    answer = Compiled(len(devices), devices[0].device_kind, cores, held, config.batch_size * per_row)
    _write(answer, folder)
    with jax.set_mesh(mesh):
        compiled = program.step.lower(state, program.abstract_batch).compile()  # type: ignore[attr-defined]
    used = resource.getrusage(resource.RUSAGE_SELF)
    answer.cpu_seconds, answer.memory_gib = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    if topology.is_gpu:
        memory = compiled.memory_analysis()
        answer.peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                       + memory.temp_size_in_bytes)
    _write(answer, folder)


def _write(answer: Compiled, folder: str) -> None:
    write_atomically(Path(folder, "answer.json"), json.dumps(asdict(answer)))


def _bytes_held(leaf: Any) -> int:
    """Returns the bytes of one array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


if __name__ == "__main__":
    _compile_here(Topology(sys.argv[1]), sys.argv[2])
