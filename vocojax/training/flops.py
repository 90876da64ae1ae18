"""Model FLOPs of a step and the peak of a device, for the model FLOP utilisation that a run logs."""

import re
from collections.abc import Mapping

import jax
import numpy as np

from vocojax.training.step import TrainState

# Dense bfloat16 TFLOP/s by JAX's `device_kind`, from the vendors' data sheets.
PEAK_TFLOPS = {
    r"TPU v4": 275, r"TPU v5 ?(lite|e)": 197, r"TPU v5p?": 459, r"TPU v6 ?(lite|e)": 918,
    r"NVIDIA A100.*": 312, r"NVIDIA H[12]00.*": 989,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, None for one that the table does not know."""
    return next((1e12 * peak for kind, peak in PEAK_TFLOPS.items() if re.fullmatch(kind, device_kind)), None)


class StepFlops:
    """FLOPs of the decoder's matrix products over the tokens that are there; attention's own and the vision tower's are
    left out, so that a utilisation made of it is a lower bound.

    A token costs 2 FLOPs per weight forwards, 2 backwards for what lies below, and 2 more for the weight itself if it
    trains; the head is paid for targets only.
    """

    def __init__(self, state: TrainState):
        self.per_token = self.per_target = 0.0
        groups: tuple[tuple[Mapping[str, jax.Array], int], ...] = ((state.trained, 6), (state.frozen, 4))
        for parameters, factor in groups:
            for name, leaf in parameters.items():
                if name.startswith("decoder/blocks/") and name.endswith("kernel"):
                    self.per_token += factor * float(np.prod(leaf.shape))
                elif name.startswith("decoder/") and "head" in name:
                    self.per_target += factor * float(np.prod(leaf.shape))

    def utilisation(self, tokens: float, targets: float, seconds: float) -> float | None:
        """Share of all devices' peak, None where that is not known."""
        peak = peak_flops(jax.devices()[0].device_kind)
        done = tokens * self.per_token + targets * self.per_target
        return None if peak is None else done / (seconds * peak * jax.device_count())
