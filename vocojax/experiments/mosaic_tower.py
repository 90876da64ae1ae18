"""The vision tower of the mosaics, pretrained to tell at every patch the colour and shape of the tile it lies in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from vocojax.config import VisionConfig, require_positive
from vocojax.data.sources.easy_vqa import COLOURS, SHAPES
from vocojax.data.sources.mosaic import TILES, MosaicSource
from vocojax.experiments.contrastive import pretrain
from vocojax.models.clip import ClipVision, normalise
from vocojax.models.layers import Linear
from vocojax.training.config import OptimizerConfig

SHIFT = 3  # pixels


@dataclass(frozen=True)
class TileTowerConfig:
    """The pretraining of a tower on mosaics.

    Attributes:
      vision: the tower; it reads a whole canvas.
      steps: optimizer steps.
      batch_size: canvases per step.
      optimizer: AdamW's settings.
      seed: of the parameters and of the order of the data.
      log_every: steps between logged metrics.
    """

    vision: VisionConfig
    steps: int = 1000
    batch_size: int = 48
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, b2=0.98, weight_decay=0.05)
    )
    seed: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "log_every")


class TileClassifier(nnx.Module):
    """A vision tower and a linear layer: [B, H, W, C] uint8 -> logits [B, P, colours + shapes]."""

    def __init__(self, config: TileTowerConfig, rngs: nnx.Rngs):
        self.vision = ClipVision(config.vision, rngs)
        self.head = Linear(config.vision.width, len(COLOURS) + len(SHAPES), ("embed", None), use_bias=True, rngs=rngs)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        return self.head(self.vision(normalise(images_BHWC, jnp.dtype(jnp.float32))))


def tile_of_patches(grid: int, patches: int) -> np.ndarray:
    """Returns int [patches * patches], the number of the tile that each patch lies in.

    Args:
      grid: tiles on a side.
      patches: patches on a side.
    """
    tile = np.arange(patches) * grid // patches
    return (tile[:, None] * grid + tile).reshape(-1)


def tile_loss(
    model: TileClassifier, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of colour and shape over all patches, and how often both are right."""
    logits_BPC = model(batch["images"])
    total, right = jnp.float32(0), jnp.bool_(True)
    for first, name in ((0, "colours"), (len(COLOURS), "shapes")):
        size = len(COLOURS) if name == "colours" else len(SHAPES)
        part_BPC = logits_BPC[..., first : first + size]
        total += optax.softmax_cross_entropy_with_integer_labels(part_BPC, batch[name]).mean()
        right &= part_BPC.argmax(-1) == batch[name]
    return total, right.mean()


def augmented(images_BHWC: np.ndarray, grid: int, random: np.random.Generator) -> np.ndarray:
    """Returns canvases of which half of the tiles are mirrored, and each is shifted by up to `SHIFT` pixels.

    Args:
      images_BHWC: uint8.
      grid: tiles on a side.
      random: of the draws.
    """
    tiles_XHWC = rearrange(images_BHWC, "b (g h) (k w) c -> (b g k) h w c", g=grid, k=grid)
    count, side = tiles_XHWC.shape[:2]
    shifts_2X1 = random.integers(-SHIFT, SHIFT + 1, (2, count, 1))
    rows_XH, columns_XW = (np.arange(side) + shifts_2X1).clip(0, side - 1)
    columns_XW = np.where(random.random((count, 1)) < 0.5, columns_XW[:, ::-1], columns_XW)
    tiles_XHWC = tiles_XHWC[np.arange(count)[:, None, None], rows_XH[:, :, None], columns_XW[:, None]]
    return rearrange(tiles_XHWC, "(b g k) h w c -> b (g h) (k w) c", g=grid, k=grid)


class _CanvasStream:
    """Endless shuffled batches of canvases with the colour and shape at every patch, from seed and step."""

    def __init__(self, source: MosaicSource, config: TileTowerConfig):
        self._images = np.stack([source.pixels(canvas) for canvas in range(len(source.tiles))])
        kinds_NT = np.array([[TILES.index(tile) for tile in tiles] for tiles in source.tiles], np.int32)
        self._kinds_NP = kinds_NT[:, tile_of_patches(source.grid, config.vision.grid)]
        self._config, self._grid, self._step = config, source.grid, 0

    def __next__(self) -> Mapping[str, np.ndarray]:
        random = np.random.default_rng((self._config.seed, self._step))
        self._step += 1
        chosen = random.choice(len(self._images), self._config.batch_size, replace=False)
        colours, shapes = np.divmod(self._kinds_NP[chosen], len(SHAPES))
        images = augmented(self._images[chosen], self._grid, random)
        return {"images": images, "colours": colours, "shapes": shapes}

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


def pretrain_tower(config: TileTowerConfig, workdir: str | Path, bar_position: int = 0) -> None:
    """Trains a tower on the canvases of `train`; a stage's `init_from` takes its run's `vision/...` parameters."""
    make = lambda rngs: TileClassifier(config, rngs)
    pretrain(config, make, _CanvasStream(MosaicSource("train"), config), tile_loss, workdir, bar_position)
