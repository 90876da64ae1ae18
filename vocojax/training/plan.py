"""The two plans of a step, which compute one loss: whole samples in a single pass, or units first and then texts.

Paper Figure 3: text never sees more of a unit than its VoCo tokens. So units can run alone, and only the keys and
values of their VoCo tokens have to be kept until the text has been read.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vocojax.data.packing import Row, row_of, row_shape
from vocojax.data.text_rows import UNIT_ARRAYS, text_row_shape
from vocojax.layout import Visibility, unit_shape
from vocojax.models import two_stage
from vocojax.models.lora import row_keys, with_dropout
from vocojax.models.two_stage import Units
from vocojax.models.voco import Rows, VocoLlama, rows_from_batch
from vocojax.parallel.mesh import BATCH_AXES, shard_batch
from vocojax.training.config import StageConfig

Batch = Mapping[str, jax.Array]


def hidden_states(
    model: VocoLlama, batch: Batch, config: StageConfig, view: str = "", axes: tuple[str, ...] = (),
    step: jax.Array | int = 0, dropout: jax.Array | None = None,
) -> jax.Array:
    """Returns the decoder's hidden states [B, S, E] at a batch's rows, by the stage's plan.

    Args:
      model: runs.
      batch: rows of the plan.
      config: of the stage.
      view: prefix of another visibility's arrays in rows of whole samples.
      axes: the mesh axes that rows and units are split over in a `jax.shard_map`.
      step: the training step; see `VocoLlama.__call__`.
      dropout: the step's key for LoRA's dropout; None for none. With it, or `config.closing`, the batch has the rows'
        numbers as `row`.
    """
    options: Any = {"attention": config.attention, "remat": config.remat}
    reader = model if dropout is None else with_dropout(model, row_keys(dropout, batch["row"]))
    if config.plan == "single_pass":
        rows = rows_from_batch(batch, view)
        if config.closing and not view:
            rows = _partly_open(rows, rows_from_batch(batch, "teacher_"), batch["row"], config, step)
        return reader(rows, step=step, axes=axes, **options)[0]
    prefix = two_stage.compress_in_chunks(
        model, _units(batch, config.unit_chunk), batch["text"], config.data.images_per_row, axes=axes, dropout=dropout,
        **options)
    return two_stage.read(reader, _texts(batch), prefix, **options)[0]


def _partly_open(
    closed: Rows, opened: Rows, row_B: jax.Array, config: StageConfig, step: jax.Array | int
) -> Rows:
    """Returns the rows of a step in which the mask closes: the first ones of the whole batch are still open."""
    open_rows = config.batch_size * (1 - step / (config.closing * config.steps))
    is_open_B1 = (row_B < open_rows)[:, None]
    positions_BS, start_BS, stop_BK = (
        jnp.where(is_open_B1, open_view, closed_view) for open_view, closed_view in
        ((opened.positions_BS, closed.positions_BS), (opened.start_BS, closed.start_BS),
         (opened.stop_BK, closed.stop_BK)))
    return closed._replace(positions_BS=positions_BS, start_BS=start_BS, stop_BK=stop_BK)


def _units(batch: Batch, chunk: int) -> Units:
    """Returns the units of a device's part of a batch, in chunks of `chunk` units at most."""
    count = batch["unit_text"].size
    size = max(divisor for divisor in range(1, chunk + 1) if count % divisor == 0)
    chunks = lambda x_BU: x_BU.reshape(-1, size, *x_BU.shape[2:])
    ids_R, positions_R, vision_R, start_R, stop_R = (batch[name][0] for name in UNIT_ARRAYS)
    return Units(chunks(batch["images"]), chunks(batch["unit_text"]), chunks(batch["unit_slot"]),
                 chunks(batch["unit_position"]), ids_R, positions_R, vision_R, start_R, stop_R)


def _texts(batch: Batch) -> Rows:
    """Returns a batch's rows of text."""
    no_vision = jnp.full_like(batch["ids"], -1)
    no_images = jnp.zeros((len(batch["ids"]), 0, 1, 1, 3), jnp.uint8)
    return Rows(batch["ids"], batch["positions"], batch["start"], batch["stop"], no_vision, no_images)


def empty_row(config: StageConfig) -> Row:
    """Returns a batch's row without a sample: the names, shapes and dtypes of its arrays."""
    model, data = config.model, config.data
    if config.plan == "single_pass":
        return row_shape(data, model.vision.image_size, model.unit_tokens, *views(config),
                         question=model.question_tokens).pack([])
    shape = text_row_shape(data, model.vision.image_size, unit_shape(model))
    return row_of(deal({name: array[None] for name, array in shape.pack([]).items()}, 1), 0)


def views(config: StageConfig) -> list[Visibility]:
    """Returns the visibilities that a stage's batches carry: its own, and that of a teacher or an open mask."""
    return [config.visibility, "causal"] if config.distill.teacher or config.closing else [config.visibility]


def place(
    batch: Mapping[str, np.ndarray], config: StageConfig, mesh: Mesh, process_index: int, process_count: int
) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices; in two stages it deals out the units before.

    Args:
      batch: from `BatchStream`.
      config: of the stage.
      mesh: the devices.
      process_index: which part of the batch this is.
      process_count: how many parts there are.
    """
    if config.plan == "two_stage":
        ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) // process_count
        batch = deal(batch, ways, config.accumulate, process_index * len(batch["ids"]))
    return shard_batch(batch, mesh)


def deal(batch: Mapping[str, np.ndarray], devices: int, accumulate: int = 1, first_text: int = 0) -> Row:
    """Deals the units of a batch out to devices, evenly and whatever row they belong to.

    Unit after unit goes to the next device, so the numbers of units of a process's devices differ by one at most. A
    process deals out its own rows' units alone, because no other process has their images.

    Args:
      batch: rows of text, of which each device gets as many.
      devices: how many.
      accumulate: parts of the batch that run one after the other; a part's units stay in it.
      first_text: the number of the first row among those of all processes.

    Returns:
      The batch, with `text` [B], the number of each row, and `unit_text` [B, U], that of the row which a unit belongs
      to, or -1.
    """
    rows, slots = batch["unit_slot"].shape
    text = np.arange(first_text, first_text + rows, dtype=np.int32)
    dealt = {**batch, "text": text, "unit_text": np.where(batch["unit_slot"] >= 0, text[:, None], -1)}
    # Places [devices, parts, rows of a part, slots], of which each part is dealt out alone.
    places = np.arange(rows * slots).reshape(devices, accumulate, -1)
    source = np.empty_like(places)
    is_used = dealt["unit_slot"].reshape(-1) >= 0
    for part in range(accumulate):
        own = places[:, part].reshape(-1)
        used_first = np.concatenate([own[is_used[own]], own[~is_used[own]]])
        source[:, part] = used_first.reshape(-1, devices).T
    for name in ("images", "unit_slot", "unit_position", "unit_text"):
        flat = dealt[name].reshape(rows * slots, *dealt[name].shape[2:])
        dealt[name] = flat[source.reshape(-1)].reshape(dealt[name].shape)
    return dealt
