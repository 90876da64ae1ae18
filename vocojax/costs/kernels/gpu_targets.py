"""GPUs that are not there: what XLA asks of a device before it compiles for it, and the rates of its units."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as its maker's documents describe it.

    Attributes:
        description: its device kind as JAX reports it.
        capability: compute capability, (major, minor).
        cores: streaming multiprocessors (SM).
        ghz: boost clock.
        bandwidth: HBM, bytes per second.
        memory, l2: bytes.
        shared, shared_per_block: shared memory of an SM, and the most that one block may ask for, in bytes.
        tensor_flops: dense bfloat16 tensor-core flops per SM and cycle.
        fp32_lanes: float32 operations per SM and cycle.
    """

    description: str
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

    def config(self) -> str:
        """The text proto that `get_topology_desc(platform='cuda', target_config=...)` takes."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared_per_block}
              threads_per_core_limit: 2048
              core_count: {self.cores}
              fpus_per_core: {self.fp32_lanes}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2}
              clock_rate_ghz: {self.ghz}
              device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            device_description_str: "{self.description}"
        """


TARGETS = {
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2_039_000_000_000, 80 << 30, 40 << 20, 167936, 166912, 2048, 64
    ),
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 3_352_000_000_000, 80 << 30, 50 << 20, 233472, 232448, 4096, 128
    ),
}
