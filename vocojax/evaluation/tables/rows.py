"""The rows of a table as a user names them: which weights, read how."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vocojax.errors import InputError
from vocojax.layout import VISIBILITIES, Visibility

UPPER, LOWER = "Upper bound", "Lower bound"
GRAMMAR = "NAME=CHECKPOINT[,vocos=N][,visibility=voco|causal]"
_OPTION = re.compile(r"(?P<rest>.+),(?P<key>vocos|visibility)=(?P<value>[^,]*)")


@dataclass(frozen=True)
class RowSource:
    """A row before it has figures.

    Attributes:
      name: shown in the table.
      checkpoint: directory of the weights, in any layout.
      vocos: how many VoCo tokens of each image are read; None for all.
      visibility: who sees whom; None for what the weights were trained with.
    """

    name: str
    checkpoint: str
    vocos: int | None = None
    visibility: Visibility | None = None

    @property
    def folder(self) -> str:
        """Name of the directory of the row's answers."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", self.name).strip("._") or "row"


def read_rows(rows: Sequence[str], upper: str | None = None, lower: str | None = None) -> list[RowSource]:
    """Returns the rows of a table: the upper bound, the others in their order, the lower bound.

    A bound's name is its own. The upper bound is read with all its vision tokens. The lower bound is read through the
    VoCo mask; by default it has the upper bound's weights, which were not trained for that (paper §4.2).

    Args:
      rows: each in the form of `GRAMMAR`; several numbers (`vocos=8/4/2/1`) make a row each.
      upper: CHECKPOINT of the upper bound, with options as above; None for none.
      lower: CHECKPOINT of the lower bound; None for the upper bound's, where that is there.

    Raises:
      InputError: a row can't be read, or two have the same name.
    """
    found: list[RowSource] = []
    if upper:
        found += _read(f"{UPPER}={upper}", "--upper", "causal")
    for text in rows:
        found += _read(text, "--row")
    if lower or upper:
        found += _read(f"{LOWER}={lower or found[0].checkpoint}", "--lower", "voco")
    for key, what in (("name", "are called"), ("folder", "keep their answers in the folder")):
        counted = Counter(getattr(row, key) for row in found)
        if twice := [value for value, times in counted.items() if times > 1]:
            raise InputError(f"--row: {counted[twice[0]]} rows {what} {twice[0]!r}; give each another name")
    return found


def _read(text: str, flag: str, visibility: Visibility | None = None) -> list[RowSource]:
    name, _, rest = text.partition("=")
    options: dict[str, str] = {}
    while match := _OPTION.fullmatch(rest):
        rest = match["rest"]
        options.setdefault(match["key"], match["value"])
    if not name.strip() or not rest.strip():
        raise InputError(f"{flag}: must be {GRAMMAR}, got {text!r}")
    chosen = options.get("visibility", visibility)
    if chosen not in (None, *VISIBILITIES):
        raise InputError(f"{flag} {name!r}: visibility must be one of {', '.join(VISIBILITIES)}, got {chosen!r}")
    counts = options["vocos"].split("/") if "vocos" in options else []
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise InputError(f"{flag} {name!r}: vocos must be whole numbers > 0 such as 4 or 8/4/2/1, got "
                         f"{options['vocos']!r}")
    if len(counts) < 2:
        return [RowSource(name.strip(), rest, int(counts[0]) if counts else None, chosen)]  # type: ignore[arg-type]
    return [RowSource(f"{name.strip()}, {count} read", rest, int(count), chosen)  # type: ignore[arg-type]
            for count in counts]
