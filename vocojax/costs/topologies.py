"""Machines that are not there, to compile for: `v5p:4x4x4`, `v5e:16x16*2` (two slices), `h100:8` (a host's GPUs)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from vocojax.config import ConfigError
from vocojax.devices import GPUS, TPUS, WITHOUT_CYCLES, Gpu
from vocojax.parallel.mesh import MeshConfig

# What libtpu has to be told on a machine without a TPU, where several processes compile.
DEVICELESS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """A machine, by its name.

    Attributes:
      name: TPU generation, chips along each axis of a slice's torus, and `*N` for N slices; or GPU and their number.

    Raises:
      ConfigError: the name is none of these.
    """

    name: str

    def __post_init__(self) -> None:
        if self.kind.lower() in WITHOUT_CYCLES:
            raise ConfigError("topology", f"{self.name!r} is of a generation whose costs are unknown: libtpu compiles "
                              "for it, but vocojax/devices.py has no cycles of its units; use one of "
                              f"{', '.join(TPUS)}")
        number = r"[1-9]\d*"
        shape = number if self.is_gpu else rf"{number}(x{number})*(\*{number})?"
        is_known = self.is_gpu or self.kind in TPUS
        if not is_known or not re.fullmatch(rf"\w+:{shape}", self.name):
            raise ConfigError("topology", f"must look like v5p:4x4x4, v5e:16x16*2 (two slices) or h100:8, of the TPUs "
                              f"{', '.join(TPUS)} or the GPUs {', '.join(GPUS)}, got {self.name!r}")

    @property
    def kind(self) -> str:
        """The TPU generation or the GPU, as `devices` names it."""
        return self.name.partition(":")[0]

    @property
    def slices(self) -> int:
        """The number of TPU slices."""
        return int(self.name.partition("*")[2] or 1)

    @property
    def count(self) -> int:
        """The number of devices; a TPU chip is one, whatever its cores."""
        return self.slices * math.prod(self._shape)

    @property
    def hosts(self) -> int:
        """The number of hosts: of 8 GPUs, of 4 TPU chips, and one host where v5e and v6e have up to 8 chips."""
        per_slice = math.prod(self._shape)
        is_one_host = self.is_gpu or (self.kind in ("v5e", "v6e") and per_slice <= 8)
        return self.slices * math.ceil(per_slice / (8 if is_one_host else 4))

    @property
    def is_gpu(self) -> bool:
        """Whether its devices are GPUs."""
        return self.kind in GPUS

    @property
    def _shape(self) -> list[int]:
        """Devices along each axis of a slice."""
        return [int(size) for size in self.name.partition(":")[2].partition("*")[0].split("x")]

    def whole(self, mesh: MeshConfig) -> MeshConfig:
        """Returns a mesh over all devices, its -1 filled in.

        Raises:
          ConfigError: its sizes do not multiply to the number of devices.
        """
        return mesh.over(self.count)

    def devices(self) -> list[Any]:
        """Returns its devices, to compile for. Only for a process without another use for XLA's TPU or GPU client."""
        from jax.experimental import topologies

        if self.is_gpu:
            return topologies.get_topology_desc(
                platform="cuda", topology_name=self.name, topology=f"1x1x{self.count}",
                target_config=_target_config(GPUS[self.kind]),
            ).devices
        shape, _, slices = self.name.partition("*")
        options: dict[str, Any] = {"num_slices": int(slices)} if slices else {}
        if self.kind == "v4":
            options["chip_config_name"] = "megacore"  # later generations are so without asking
        if set(self._shape) == {1}:
            options["chips_per_host_bounds"] = (1, 1, 1)  # before 0.0.52 libtpu takes a whole host for granted
        return topologies.get_topology_desc(shape, platform="tpu", **options).devices


def _target_config(gpu: Gpu) -> str:
    """Returns what XLA asks of a GPU before it compiles for it, as a text proto."""
    major, minor = gpu.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {gpu.shared}
          shared_memory_per_block_optin: {gpu.shared_per_block}
          threads_per_core_limit: 2048
          core_count: {gpu.cores}
          fpus_per_core: {gpu.fp32_lanes}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {gpu.bandwidth}
          l2_cache_size: {gpu.l2}
          clock_rate_ghz: {gpu.ghz}
          device_memory_size: {gpu.memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }}
        device_description_str: "{gpu.device_kind}"
    """
