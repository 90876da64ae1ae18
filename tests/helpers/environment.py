"""Environments of the processes that tests start: programs are compiled as in the tests' own process."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
# Tests run their programs a few times on tiny shapes: most of their time is compilation. LLVM optimizes less, fused
# operations are written by the older emitter, which compiles several times faster, and a program is one LLVM module.
COMPILER_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# Many tests compile the same programs, most of them small.
KEEPING_PROGRAMS = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def on_cpu(devices: int = 1) -> dict[str, str]:
    """Returns the environment variables of a process that computes on virtual CPU devices; PATH is not among them."""
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{COMPILER_FLAGS} --xla_force_host_platform_device_count={devices}",
        **KEEPING_PROGRAMS,
    }
