"""Reports what the attention kernels cost on accelerators that are not there.

    vocojax kernel_report --topology=v5e:1x1,v5p:1x1x1,v6e:1x1 --gpu=a100,h100 --json=report.json

Public kernels are compiled for comparison. Takes minutes on a CPU. Needs the extras `tpu` (libtpu) and `cuda` (the CUDA
plugin; also nvidia-cuda-nvcc and nvidia-cuda-nvdisasm).
"""

import json
from collections.abc import Sequence

from absl import app, flags

from vocojax.cli.flag_checks import refuse_arguments, require_writable
from vocojax.devices import GPUS

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"], "TPU topologies to compile for; may be empty.")
    flags.DEFINE_list("gpu", [], f"GPUs to compile for: any of {', '.join(GPUS)}.")
    flags.DEFINE_string("json", None, "File to write all figures to.")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Reports."""
    refuse_arguments(arguments)
    if unknown := set(FLAGS.gpu) - set(GPUS):
        raise app.UsageError(f"--gpu: {sorted(unknown)} unknown, choose from {sorted(GPUS)}")
    import jax

    from vocojax.costs.kernels import gpu, report

    jax.config.update("jax_platforms", "cpu")  # accelerators that are there are not used
    figures = {"layouts": report.tpu_report(FLAGS.topology), "gpu": gpu.gpu_report(FLAGS.gpu)}
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    for name, layout in figures["layouts"].items():
        print(f"({name}) {layout['title']}: {layout['live_tiles']} tiles computed, "
              f"{layout['tiles_with_a_visible_pair']} hold a visible pair")
        for topology in FLAGS.topology:
            ours, splash = (_tpu(who, layout[topology][who]) for who in ("ours", "splash"))
            print(f"    {topology:12} {ours}   {splash}   {layout[topology]['ratio']:.2f} x")
    for target, passes in figures["gpu"].items():
        for name, entry in passes.items():
            print(f"{target} {name}: bound of a full tile {entry['ratio']:.2f} x, of a partial tile "
                  f"{entry['partial_ratio']:.2f} x that of jax.experimental.pallas.ops.gpu.attention; "
                  f"{entry['ours']['spills']} bytes spilled")


def _tpu(who: str, figures: dict) -> str:
    shares = " + ".join(f"{figures[name]['visible_share']:.0%}" for name in ("forward", "backward"))
    return (f"{who} {figures['seconds'] * 1e3:8.3f} ms, MXU {figures['mxu_util']:.0%}, visible pairs at its full rate "
            f"{shares}, {figures['spills']:.0f} spills")
