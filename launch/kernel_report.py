"""What the attention kernels cost on accelerators that are not there, beside public kernels (minutes, CPU only).

    python launch/kernel_report.py --topology v5e:1x1,v5p:1x1x1,v6e:1x1 --gpu a100,h100 --json report.json

Needs the extras `tpu` (libtpu) and `cuda` (the CUDA plugin; also nvidia-cuda-nvcc and nvidia-cuda-nvdisasm).
"""

import json

import jax
from absl import app, flags

from vocojax.costs.kernels import gpu, report
from vocojax.devices import GPUS

TOPOLOGY = flags.DEFINE_list(
    "topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"], "TPU topologies to compile for; may be empty."
)
GPU = flags.DEFINE_list("gpu", [], f"GPUs to compile for: any of {', '.join(GPUS)}.")
JSON = flags.DEFINE_string("json", None, "Where to write all figures.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if unknown := set(GPU.value) - set(GPUS):
        raise app.UsageError(f"--gpu: {sorted(unknown)} unknown, choose from {sorted(GPUS)}")
    jax.config.update("jax_platforms", "cpu")  # accelerators that are there are not used
    figures = {"layouts": report.tpu_report(TOPOLOGY.value), "gpu": gpu.gpu_report(GPU.value)}
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(figures, file, indent=2)
    for name, layout in figures["layouts"].items():
        print(
            f"({name}) {layout['title']}: {layout['live_tiles']} tiles computed, "
            f"{layout['tiles_with_a_visible_pair']} hold a visible pair"
        )
        for topology in TOPOLOGY.value:
            print(
                f"    {topology:12} "
                + "   ".join(_tpu(who, layout[topology][who]) for who in ("ours", "splash"))
                + f"   {layout[topology]['ratio']:.2f} x"
            )
    for target, passes in figures["gpu"].items():
        for name, entry in passes.items():
            print(
                f"{target} {name}: bound of a full tile {entry['ratio']:.2f} x, of a partial tile "
                f"{entry['partial_ratio']:.2f} x that of jax.experimental.pallas.ops.gpu.attention; "
                f"{entry['ours']['spills']} bytes spilled"
            )


def _tpu(who: str, figures: dict) -> str:
    return f"{who} {figures['seconds'] * 1e3:8.3f} ms, MXU {figures['mxu_util']:.0%}, {figures['spills']:.0f} spills"


if __name__ == "__main__":
    app.run(main)
