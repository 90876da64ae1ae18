"""Writes the stored figures (`measured/*.json`) into pages: `<!-- measured NAME -->`, or `all` for every table."""

import json
import re
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).with_name("measured")
MARK = re.compile(r"<!-- measured (\w+) -->")


def table(entry: dict[str, Any]) -> str:
    """Returns a stored table as Markdown.

    Args:
      entry: `columns`, `rows` (lists of cells), and its origin: `command`, `machine`, `versions`, `date`, `note`.
    """
    lines = [entry["columns"], ["---"] * len(entry["columns"]), *entry["rows"]]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    origin = "; ".join(entry[key] for key in ("machine", "versions", "date") if entry.get(key))
    return f"{text}\n\n{entry.get('note', '')}\n\n```bash\n{entry['command']}\n```\n\n*{origin}*\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the marks of a page; MkDocs calls it."""

    def written(match: re.Match[str]) -> str:
        if match[1] != "all":
            return table(json.loads((MEASURED / f"{match[1]}.json").read_text()))
        entries = [json.loads(path.read_text()) for path in sorted(MEASURED.glob("*.json"))]
        return "\n".join(f"## {entry['title']}\n\n{table(entry)}" for entry in entries)

    return MARK.sub(written, markdown)
