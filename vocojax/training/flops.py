"""Model FLOPs of a step, for the model FLOP utilisation (MFU) that a run logs."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vocojax.config import ModelConfig
from vocojax.devices import peak_flops
from vocojax.training.step import TrainState


class StepFlops:
    """Model FLOPs of a step: those of the matrix products that it takes by definition.

    What rematerialisation repeats and what padding and empty slots add are left out, and so are the compressors of the
    baselines. A weight costs 2 FLOPs per token in the forward pass, 2 more for the gradient of its input if anything
    before it trains, and 2 more for its own gradient if it trains itself. A teacher's weight costs 2.

    Attributes:
      per_token: of the decoder's layers.
      per_image: of the vision tower, its attention included, and the projector.
      per_target: of the head.
      per_pair: of attention in all layers, for a query and a key that it sees.
      per_teacher_pair: the same of the teacher.
    """

    def __init__(self, config: ModelConfig, state: TrainState):
        self._config, self._patches = config, config.tower_grid**2
        self.per_token = self.per_image = self.per_target = 0.0
        begins = lambda *starts: any(name.startswith(starts) for name in state.trained)
        vision = begins("vision/", "compressor/")
        flows = {  # whether a gradient passes through, by what the path begins with
            "vision/patch_embedding": False, "vision/": begins("vision/"),
            "projector/linear_in": vision, "projector/": vision or begins("projector/"),
            "decoder/": vision or begins("projector/", "decoder/blocks/", "decoder/embedding",
                                           "decoder/voco_offsets"),
        }
        for parameters, factor in ((state.trained, 4), (state.frozen, 2)):
            for name, leaf in parameters.items():
                passes = next((passes for start, passes in flows.items() if name.startswith(start)), False)
                self._add(name, leaf, factor + 2 * passes)
        for name, leaf in state.teacher.items():
            self._add(name, leaf, 2)
        decoder, tower = config.decoder, config.vision
        per_pair = 4.0 * decoder.num_heads * decoder.head_width * decoder.depth
        self.per_pair, self.per_teacher_pair = 3 * per_pair, per_pair * bool(state.teacher)
        layers = tower.depth + 1 + tower.select_layer
        attention = 4.0 * (self._patches + 1) ** 2 * tower.width * layers
        self.per_image += attention * ((3 if begins("vision/") else 1) + bool(state.teacher))

    def _add(self, name: str, leaf: Any, factor: int) -> None:
        config, cost = self._config, factor * float(np.prod(leaf.shape))
        is_weight = name.endswith(("/kernel", "/lora/a", "/lora/b"))
        is_head = name == ("decoder/embedding" if config.decoder.tie_embeddings else "decoder/head/kernel")
        if is_head:
            self.per_target += cost * config.decoder.num_tokens / config.decoder.vocab_size
        elif name.startswith("decoder/blocks/") and is_weight:
            self.per_token += cost
        elif name.startswith("projector/") and is_weight:
            self.per_image += cost * config.unit_tokens
        elif name.startswith("vision/blocks/") and is_weight:
            self.per_image += cost * (self._patches + 1)
        elif name in ("vision/patch_embedding", "vision/patch_embedding/kernel"):  # CLIP's and EVA's
            self.per_image += cost * self._patches

    def total(self, tokens: float, targets: float, images: float, pairs: float, teacher_pairs: float = 0.0) -> float:
        """Returns the model FLOPs of one step with these counts."""
        return (tokens * self.per_token + targets * self.per_target + images * self.per_image + pairs * self.per_pair
                + teacher_pairs * self.per_teacher_pair)


class Composition:
    """Images and visible pairs per token, of the rows that this process has seen.

    Tokens and targets are counted by the step itself. Nothing is counted for devices whose peak is not known.
    """

    def __init__(self, unit_tokens: int):
        self._unit_tokens, self._peak = unit_tokens, peak_flops(jax.devices()[0].device_kind)
        self._tokens = self._in_units = self._images = self._pairs = self._teacher_pairs = 0.0

    def see(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts a host batch."""
        if self._peak is None:
            return
        self._tokens += float(batch["num_tokens"].sum())
        if "unit_slot" in batch:
            self._see_two_stages(batch)
            return
        self._images += float((batch["vision"] >= 0).sum()) / self._unit_tokens
        self._pairs += visible_pairs(batch["start"], batch["stop"])
        if "teacher_start" in batch:
            self._teacher_pairs += visible_pairs(batch["teacher_start"], batch["teacher_stop"])

    def _see_two_stages(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts the units of rows of text, and what both see."""
        units = float((batch["unit_slot"] >= 0).sum())
        start_1R, stop_1R = batch["unit_start"][:1], batch["unit_stop"][:1]
        self._images += units
        self._in_units += units * float((stop_1R > np.arange(stop_1R.shape[1])).sum())
        self._pairs += units * visible_pairs(start_1R, stop_1R)
        # A query for each key of the prefix, which sees that key alone, makes masks without a prefix.
        rows, prefix = len(batch["start"]), batch["stop"].shape[1] - batch["start"].shape[1]
        own = np.tile(np.arange(prefix, dtype=np.int32), (rows, 1))
        added = float((batch["stop"][:, :prefix] > own).sum())
        self._pairs += visible_pairs(np.concatenate([own, batch["start"]], axis=1), batch["stop"]) - added

    def utilisation(self, flops: StepFlops, tokens: float, targets: float, seconds: float) -> float | None:
        """Returns the MFU of steps with these tokens and targets in these seconds; None if no peak is known."""
        if self._peak is None or not self._tokens:
            return None
        share = tokens / self._tokens
        run = tokens + share * self._in_units
        done = flops.total(run, targets, share * self._images, share * self._pairs, share * self._teacher_pairs)
        return done / (seconds * self._peak * jax.device_count())


def visible_pairs(start_BS: np.ndarray, stop_BS: np.ndarray) -> int:
    """Counts the pairs of a query and a key that it sees, in interval masks without a prefix.

    Key j is seen by the queries i of [j, stop[j]) with start[i] <= j. All i of [0, j) have start[i] <= i < j, because a
    query's window holds itself. So the count is that of the i in [0, stop[j]) with start[i] <= j, less j. This takes
    O(S log S) per row and distinct `stop`.

    Args:
      start_BS: int32 [B, S].
      stop_BS: int32 [B, S].
    """
    pairs, index = 0, np.arange(start_BS.shape[1])
    for start, stop in zip(start_BS, stop_BS, strict=True):
        seen = np.flatnonzero(stop > index)
        for end in np.unique(stop[seen]):
            keys = seen[stop[seen] == end]
            pairs += int((np.searchsorted(np.sort(start[:end]), keys, side="right") - keys).sum())
    return pairs
