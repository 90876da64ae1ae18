"""Images as the patches of a vision transformer, all of them or fewer of a reduced image."""

import jax
import jax.numpy as jnp
from einops import rearrange

from vocojax.config import VisionConfig
from vocojax.errors import InputError


def cut(pixels_UHWC: jax.Array, config: VisionConfig, grid: int) -> jax.Array:
    """Cuts images into patches [U, grid * grid, C], row after row; C are the pixels of a patch.

    Args:
      pixels_UHWC: normalised pixels of the tower's image size.
      config: the tower's.
      grid: patches on a side; an image is reduced to this grid with a bicubic, antialiased filter.

    Raises:
      InputError: images of another size than the tower's.
    """
    size, patch = config.image_size, config.patch_size
    if pixels_UHWC.shape[1:] != (size, size, 3):
        raise InputError(f"the vision tower takes images of {size}x{size}x3, got {pixels_UHWC.shape[1:]}: "
                         "preprocess them with vocojax.data.images for this model's image_size")
    if grid != config.grid:
        shape = len(pixels_UHWC), grid * patch, grid * patch, 3
        reduced_UHWC = jax.image.resize(pixels_UHWC.astype(jnp.float32), shape, "cubic")
        pixels_UHWC = reduced_UHWC.astype(pixels_UHWC.dtype)
    return rearrange(pixels_UHWC, "u (h p) (w q) c -> u (h w) (p q c)", p=patch, q=patch)


def positions_of(embedding_SE: jax.Array, config: VisionConfig, grid: int) -> jax.Array:
    """Returns the position embeddings [1 + grid * grid, E] of an image with this grid of patches.

    The patches' are interpolated with a bicubic, antialiased filter, as DINOv2 does (arXiv 2304.07193). The class
    token's, which comes first, stays.

    Args:
      embedding_SE: those of an image of the tower's size.
      config: the tower's.
      grid: patches on a side.
    """
    if grid == config.grid:
        return embedding_SE
    on_grid_GGE = rearrange(embedding_SE[1:], "(h w) e -> h w e", h=config.grid)
    reduced_GGE = jax.image.resize(on_grid_GGE, (grid, grid, embedding_SE.shape[1]), "cubic")
    return jnp.concatenate([embedding_SE[:1], rearrange(reduced_GGE, "h w e -> (h w) e")])
