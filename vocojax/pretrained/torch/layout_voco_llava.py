"""Which token may see which, from token ids alone: two integer vectors, and the masks that attention takes.

A row of ids is one sample: k visual units and then text. With padding on either side it looks like

    [pad] [BOS] [<image> x n] [newline] [<voco> x N] ... [BOS] [<image> x n] [newline] [<voco> x N] [text] [pad]

A unit sees only itself. Text sees, of the units, only the VoCo tokens, and all earlier text. Query i may attend to key
j iff `start[i] <= j <= i and i < stop[j]`.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Layout(NamedTuple):
    """The positions and the visibility of rows of S tokens.

    Padding sees itself, so that no row of attention is empty, and nobody else sees it.

    Attributes:
      positions_BS: int64, rotary positions.
      start_BS: int64, the first key of each query's window.
      stop_BS: int64, the first query that no longer sees each key. Text that follows later sees what the last token
        sees.
    """

    positions_BS: torch.Tensor
    start_BS: torch.Tensor
    stop_BS: torch.Tensor


_NEVER = torch.iinfo(torch.int64).max  # `stop` of a key that all later tokens see


def voco_layout(
    is_token_BS: torch.Tensor, is_voco_BS: torch.Tensor, first_position: int, gap: int, cached_vocos: int | None
) -> Layout:
    """Lays out rows in which units stand alone, and text sees only their VoCo tokens.

    Unit t has the positions of a single unit, shifted by t * (N + gap), and text follows the last VoCo token. Units
    that a cache holds are in the row as their VoCo tokens alone; text after them has the same positions.

    Args:
      is_token_BS: bool, False for padding.
      is_voco_BS: bool, True for VoCo tokens.
      first_position: position of a unit's first VoCo token in the unit.
      gap: positions between the VoCo tokens of two units: 0 if they are consecutive (compact positions).
      cached_vocos: VoCo tokens of each unit, N, if a cache holds the units; None for rows with whole units.
    """
    length = is_token_BS.shape[1]
    index_BS = torch.arange(length, device=is_token_BS.device).expand_as(is_token_BS)
    vocos_BS = is_voco_BS.cumsum(-1)
    in_unit_BS = is_token_BS & (is_voco_BS | (vocos_BS < vocos_BS[:, -1:]))
    ends_unit_BS = is_voco_BS & ~_shifted_left(is_voco_BS)
    units_BS = ends_unit_BS.cumsum(-1) if cached_vocos is None else vocos_BS // cached_vocos
    # A unit begins after padding or after the unit before it.
    begins_BS = in_unit_BS & (_shifted_right(ends_unit_BS) | ~_shifted_right(is_token_BS))
    start_BS = torch.where(begins_BS, index_BS, 0).cummax(-1).values
    end_BS = torch.where(ends_unit_BS, index_BS + 1, length).flip(-1).cummin(-1).values.flip(-1)
    before_BS = vocos_BS - is_voco_BS.long() + gap * (units_BS - ends_unit_BS.long())  # positions of earlier units
    unit_position_BS = index_BS - start_BS + before_BS.gather(1, start_BS)
    text_index_BS = (is_token_BS & ~in_unit_BS).cumsum(-1) - 1
    vocos_B1, units_B1 = vocos_BS[:, -1:], units_BS[:, -1:]
    text_start_B1 = torch.where(units_B1 > 0, first_position + vocos_B1 + gap * (units_B1 - 1), 0)
    positions_BS = torch.where(in_unit_BS, unit_position_BS, text_start_B1 + text_index_BS)
    start_BS = torch.where(in_unit_BS, start_BS, 0)
    stop_BS = torch.where(in_unit_BS & ~is_voco_BS, end_BS, _NEVER)
    return Layout(torch.where(is_token_BS, positions_BS, 0), torch.where(is_token_BS, start_BS, index_BS),
                  torch.where(is_token_BS, stop_BS, index_BS + 1))


def _shifted_left(x_BS: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x_BS[:, 1:], (0, 1))


def _shifted_right(x_BS: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x_BS[:, :-1], (1, 0))


def allowed(layout: Layout, queries: int) -> torch.Tensor:
    """Returns bool [B, 1, Q, S]: which of the S keys each of the last Q queries sees."""
    index_S = torch.arange(layout.stop_BS.shape[1], device=layout.stop_BS.device)
    query_Q1 = index_S[-queries:, None]
    window_BQS = (layout.start_BS[:, -queries:, None] <= index_S) & (query_Q1 < layout.stop_BS[:, None])
    return (window_BQS & (index_S <= query_Q1))[:, None]


def voco_windows(init: str, num_vocos: int, side: int) -> torch.Tensor:
    """Returns bool [N, P]: which of a square image's patches are in each VoCo token's window.

    Args:
      init: `pool`: windows that make up a grid, row after row. `pool_nested`: the whole image, its quarters, the 16
        quarters of these, and so on.
      num_vocos: number of VoCo tokens, N.
      side: patches on a side of an image.
    """
    if init == "pool":
        rows = max(number for number in range(1, math.isqrt(num_vocos) + 1) if num_vocos % number == 0)
        return _grid_windows(rows, num_vocos // rows, side)
    grids, windows = [_grid_windows(1, 1, side)], 1
    while sum(map(len, grids)) < num_vocos:
        windows *= 2
        grids.append(_grid_windows(windows, windows, side))
    return torch.cat(grids)[:num_vocos]


def _grid_windows(rows: int, columns: int, side: int) -> torch.Tensor:
    """Returns bool [rows * columns, side * side], the patches of each of a grid's windows, row after row."""
    patch = torch.arange(side)
    window_P = ((patch * rows // side)[:, None] * columns + patch * columns // side).reshape(-1)
    return window_P == torch.arange(rows * columns)[:, None]


def voco_places(
    is_voco_BS: torch.Tensor, is_image_BS: torch.Tensor, per_image: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int [V], for each VoCo token of rows with whole units: its image among all rows', and its number in it.

    Args:
      is_voco_BS: bool, True for VoCo tokens.
      is_image_BS: bool, True for vision tokens.
      per_image: vision tokens of an image.
    """
    index_S = torch.arange(is_voco_BS.shape[1], device=is_voco_BS.device)
    latest_other_BS = torch.where(is_voco_BS, -1, index_S).cummax(-1).values
    image_BS = (is_image_BS.flatten().cumsum(0).view_as(is_image_BS) - 1) // per_image
    return image_BS[is_voco_BS], (index_S - latest_other_BS - 1)[is_voco_BS]


def attention_mask_of(layout: Layout, queries: int, keys: int, attention: str, dtype: torch.dtype) -> object:
    """Returns the mask of the last `queries` tokens, in the form that transformers' attention takes.

    Args:
      layout: of the whole rows, from their first token on.
      queries: number of queries, Q.
      keys: number of keys that attention gets, K >= S: a static cache has empty slots after the last token.
      attention: transformers' name of the implementation.
      dtype: dtype of the computation.

    Returns:
      bool [B, 1, Q, K] for `sdpa`; the same as numbers to add for `eager`; a block mask for `flex_attention`.

    Raises:
      ValueError: the implementation takes no such mask.
    """
    if attention == "flex_attention":
        return _block_mask(layout, queries, keys)
    mask_BQK = torch.nn.functional.pad(allowed(layout, queries), (0, keys - layout.stop_BS.shape[1]))
    if attention == "sdpa":
        return mask_BQK
    if attention == "eager":
        return torch.zeros(mask_BQK.shape, dtype=dtype, device=mask_BQK.device).masked_fill(
            ~mask_BQK, torch.finfo(dtype).min)
    raise ValueError(f"attn_implementation {attention!r} can't take the VoCo mask: load the model with 'sdpa', "
                     "'flex_attention' or 'eager'")


def _block_mask(layout: Layout, queries: int, keys: int) -> BlockMask:
    rows, length = layout.stop_BS.shape
    start_BQ = layout.start_BS[:, -queries:].contiguous()
    stop_BK = torch.nn.functional.pad(layout.stop_BS, (0, keys - length))
    index_Q = torch.arange(length - queries, length, device=start_BQ.device)  # numbers would be compiled into kernels

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        index = index_Q[query]
        return (start_BQ[row, query] <= key) & (key <= index) & (index < stop_BK[row, key])

    return create_block_mask(sees, rows, None, queries, keys, device=str(start_BQ.device))
