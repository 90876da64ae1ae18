"""The table of chips, against data sheets and against its own other columns."""

import pytest

from vocojax.devices import GPUS, TPUS, is_hopper, known_tpu, peak_flops, tpu
from vocojax.kernels.interval_attention import gpu_blocks, tpu_blocks


def test_peaks_are_those_of_the_data_sheets():
    peaks = {
        "TPU v5 lite": 197, "TPU v5p": 459, "TPU v5": 459, "TPU v4": 275, "TPU v6e": 918, "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989,
        "NVIDIA H200 NVL": 835, "NVIDIA GH200 480GB": 989,
    }  # fmt: skip
    assert {kind: peak_flops(kind) for kind in peaks} == {kind: peak * 1e12 for kind, peak in peaks.items()}
    assert peak_flops("cpu") is None and tpu("cpu") is None
    with pytest.raises(KeyError, match=r"'TPU v3' is no TPU of vocojax/devices\.py: add it there"):
        known_tpu("TPU v3")


@pytest.mark.parametrize("name", GPUS)
def test_the_peak_of_a_gpu_is_that_of_its_tensor_cores(name):
    """The data sheet of the H100 counts with less than its boost clock."""
    gpu = GPUS[name]
    peak = peak_flops(gpu.device_kind)
    assert peak is not None and 0.9 < peak / (gpu.cores * gpu.tensor_flops * gpu.ghz * 1e9) < 1.01
    assert is_hopper(gpu.device_kind) == (gpu.capability == (9, 0))


def test_every_chip_has_blocks():
    assert set(tpu_blocks.GENERATIONS) == set(TPUS)
    for chip in TPUS.values():
        assert {tpu_blocks.generation(kind) for kind in chip.device_kinds} == {chip.generation}
    assert tpu_blocks.generation("TPU v9") == "v4", "the most frugal blocks fit everywhere"
    assert {gpu_blocks.architecture(gpu.device_kind) for gpu in GPUS.values()} == set(gpu_blocks.ARCHITECTURES)
