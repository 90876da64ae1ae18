"""Draws the masks of the page "The method in pictures", from the code that decides who sees whom.

    python docs/figures.py        writes docs/images/*.svg
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from vocojax.evaluation.report import ROLE_COLOURS
from vocojax.layout import Role, SampleLayout, Span, UnitShape, Visibility, lay_out_sample
from vocojax.testing import tiny_tokenizer

IMAGES = Path(__file__).with_name("images")


def sees(sample: SampleLayout, visibility: Visibility) -> np.ndarray:
    """Returns bool [S, S]: whether a query (row) sees a key (column)."""
    view, index = sample.view(visibility), np.arange(len(sample))
    return (view.start[:, None] <= index) & (index <= index[:, None]) & (index[:, None] < view.stop)


def side_by_side(samples: Sequence[SampleLayout], visibility: Visibility) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mask of samples that are packed into one row, and the role of every token."""
    roles = np.concatenate([sample.roles for sample in samples])
    mask, first = np.zeros((len(roles), len(roles)), bool), 0
    for sample in samples:
        own = slice(first, first + len(sample))
        mask[own, own] = sees(sample, visibility)
        first += len(sample)
    return mask, roles


def draw(path: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draws masks with their keys' roles as colours.

    Args:
      path: of the picture.
      panels: by their titles, a mask and its tokens' roles.
    """
    colours = ListedColormap(["white", *ROLE_COLOURS.values()])
    paint = {role: i + 1 for i, role in enumerate(ROLE_COLOURS)}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.6), layout="constrained", squeeze=False)
    for axis, (title, (mask, roles)) in zip(axes[0], panels.items(), strict=True):
        key_colour = np.array([paint[Role(role)] for role in roles])
        axis.imshow(np.where(mask, key_colour, 0), cmap=colours, vmin=0, vmax=len(paint), interpolation="nearest")
        axis.set(title=title, xlabel="token that is seen", ylabel="token that sees")
        axis.set_xticks(np.arange(len(roles)) - 0.5, labels=[], minor=True)
        axis.set_yticks(np.arange(len(roles)) - 0.5, labels=[], minor=True)
        axis.grid(which="minor", color="#eef1f5", linewidth=0.5)
        axis.tick_params(which="minor", length=0)
    names = [Patch(color=colour, label=role.name.lower()) for role, colour in ROLE_COLOURS.items()]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draws every picture of the page."""
    matplotlib.rcParams["svg.hashsalt"] = "vocojax"  # the same file whenever it is drawn
    tokenizer = tiny_tokenizer()

    def sample(units: int, unit: UnitShape, *texts: str) -> SampleLayout:
        return lay_out_sample("drawn", units, [[Span(text)] for text in texts], tokenizer, unit, 200)

    one = sample(1, UnitShape(8, 2), "what is it?")
    draw(IMAGES / "one_image.svg", {"VoCo mask": side_by_side([one], "voco"),
                                    "Upper bound (causal)": side_by_side([one], "causal")})
    two = [sample(2, UnitShape(6, 2), "are they red?"), sample(1, UnitShape(6, 2), "what is it?", "is it red?")]
    draw(IMAGES / "packed_row.svg", {"Two samples: two images; one image and two threads": side_by_side(two, "voco")})
    film = sample(3, UnitShape(6, 1), "what moved?")
    draw(IMAGES / "video.svg", {"Three frames, N = 1": side_by_side([film], "voco")})


if __name__ == "__main__":
    main()
