"""Packed rows as a page to look at: images, tokens coloured by role, targets underlined, and the mask."""

import base64
import html
import io
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vocojax.data.packing import Item, Row, RowShape
from vocojax.data.text_rows import TextRowShape
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import IGNORE, Role, SampleLayout

COLOURS = {Role.BOS: "#8c96a8", Role.VISION: "#7fb2e5", Role.NEWLINE: "#c3cad6", Role.VOCO: "#e4572e",
           Role.TEXT: "#3c9d6b"}
WORDS = {Role.BOS: "BOS", Role.VISION: "vision", Role.NEWLINE: "newline of a unit", Role.VOCO: "VoCo",
         Role.TEXT: "text"}
LARGEST_MASK = 512  # pixels
# Where several points share a pixel, the first role of these is shown: VoCo tokens are a thin line and must not vanish.
SHOWN_FIRST = (Role.VOCO, Role.TEXT, Role.BOS, Role.NEWLINE, Role.VISION)
STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; color: #1c2330; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .2rem; } .note { color: #5a6475; }
.token { padding: .1em .15em; border-radius: .2em; white-space: pre-wrap;
  background: color-mix(in srgb, var(--role) 25%, white); }
.target { text-decoration: underline 2px; text-underline-offset: .25em; } .unit { height: 96px; margin: .2rem; }
.mask { image-rendering: pixelated; width: 512px; border: 1px solid #c3cad6; }
"""
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Packed rows</title><style>{style}</style>
<h1>Packed rows</h1><p>Rows as training reads them. {legend} Underlined tokens are targets: the model learns to
predict them, each from what the token before it sees. In a picture of the mask a point is a query (from top to bottom)
that sees a key (from left to right), in the colour of the key's role. A line of VoCo tokens is at least one pixel wide.
</p>
"""


def page(rows: Sequence[Sequence[Item]], shape: RowShape | TextRowShape, tokenizer: Tokenizer) -> str:
    """Returns a page of HTML with everything in it.

    Args:
      rows: the items of each row.
      shape: of the rows.
      tokenizer: writes the tokens.
    """
    legend = " ".join(f'<span class="token" style="--role:{colour}">{WORDS[role]}</span>'
                      for role, colour in COLOURS.items())
    return "\n".join([HEAD.format(style=STYLE, legend=legend),
                      *(_row(index, items, shape, tokenizer) for index, items in enumerate(rows)), "</html>"])


def _row(index: int, items: Sequence[Item], shape: RowShape | TextRowShape, tokenizer: Tokenizer) -> str:
    row = shape.pack(items)
    used = int(row["num_tokens"])
    targets = int((row["target_ids"] != IGNORE).sum())
    mask = _png(mask_picture(row, _roles_of_keys(items, row)))
    return "\n".join([
        f"<h2>Row {index}</h2>",
        f'<p class="note">{used:,} tokens in a row of {shape.length:,} ({used / shape.length:.1%} full), '
        f"{sum(item.layout.num_units for item in items)} images (room for {shape.images}), {targets:,} targets "
        f"(room for {shape.targets:,})</p>",
        *(_sample(item, tokenizer) for item in items),
        f'<h3>The mask</h3><img class="mask" alt="mask of row {index}" src="{mask}">',
    ])


def _sample(item: Item, tokenizer: Tokenizer) -> str:
    pictures = "".join(f'<img class="unit" alt="unit {slot}" src="{_png(Image.fromarray(pixels))}">'
                       for slot, pixels in enumerate(item.images))
    return f"<h3>{html.escape(item.layout.record)}</h3>{pictures}<p>{tokens(item.layout, tokenizer)}</p>"


def tokens(layout: SampleLayout, tokenizer: Tokenizer) -> str:
    """Returns a sample's tokens as HTML; a run of one role's vision or VoCo tokens is one box with their number."""
    boxes = []
    kinds = zip(layout.roles.tolist(), (layout.labels != IGNORE).tolist(), layout.threads.tolist(), strict=True)
    place = 0
    for (role, is_target, _), run in itertools.groupby(kinds):
        length = len(list(run))
        ids, place = layout.ids[place : place + length].tolist(), place + length
        if role == Role.VISION:
            texts = [f"image x {length}"]
        elif role == Role.VOCO:
            texts = [f"{tokenizer.voco_token} x {length}"]
        else:
            texts = [str(token).replace("\n", "↵\n") for token in tokenizer.huggingface.convert_ids_to_tokens(ids)]
        style = f'class="token{" target" * is_target}" style="--role:{COLOURS[Role(role)]}"'
        boxes += [f"<span {style}>{html.escape(text)}</span>" for text in texts]
    return "\n".join(boxes)


def _roles_of_keys(items: Sequence[Item], row: Row) -> np.ndarray:
    """Returns the role of each key: of a row's tokens, or of the prefix's VoCo tokens and the text after them."""
    keys = len(row["stop"])
    roles = np.full(keys, int(Role.PAD))
    prefix = keys - len(row["start"])
    own = np.concatenate([item.layout.roles[item.layout.text_start if prefix else 0 :] for item in items])
    roles[:prefix] = Role.VOCO
    roles[prefix : prefix + len(own)] = own
    return roles


def mask_picture(row: Row, roles: np.ndarray) -> Image.Image:
    """Returns who sees whom in a row as a picture: a point per query and key, in the colour of the key's role.

    A long row has a pixel for several points, and shows the first of `SHOWN_FIRST` among them.
    """
    queries, keys = np.arange(len(row["start"])), np.arange(len(row["stop"]))
    index = queries[:, None] + len(keys) - len(queries)
    sees = (row["start"][:, None] <= keys) & (keys <= index) & (index < row["stop"])
    palette, rank = np.full((len(SHOWN_FIRST) + 1, 3), 255, np.uint8), np.zeros(max(Role) + 1, np.uint8)
    for place, role in enumerate(reversed(SHOWN_FIRST), 1):  # 0 is nothing seen
        rank[role], palette[place] = place, [int(COLOURS[role][i : i + 2], 16) for i in (1, 3, 5)]
    points = np.where(sees, rank[roles], 0)
    step = -(-max(points.shape) // LARGEST_MASK)
    padded = np.pad(points, [(0, -size % step) for size in points.shape])
    height, width = (size // step for size in padded.shape)
    return Image.fromarray(palette[padded.reshape(height, step, width, step).max((1, 3))])


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
