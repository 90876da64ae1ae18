"""Makes the stored tables again (`measured/*.json`), says which figures changed, and writes the README's tables.

    python docs/measure.py --list                what each table needs, and how old it is
    python docs/measure.py kernels torch_peer    runs their commands and stores what they found
    python docs/measure.py --read mosaic         stores what its command has found already, without running it
    python docs/measure.py --check               runs nothing; fails where the README differs from the stored tables
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from docs import front_page, tables
from docs.tables import TABLES, NoResult, Rows, Table
from vocojax.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"[-−]?\d[\d,]*\.?\d*")


def stored_names() -> list[str]:
    """Returns the names of all stored tables."""
    return sorted(path.stem for path in front_page.MEASURED.glob("*.json"))


def machine(table: Table) -> str:
    """Returns what the figures were made on."""
    if table.is_static:
        return "no TPU: the compiler's own output"
    described = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", described.read_text() if described.exists() else "", re.MULTILINE)
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, no accelerator"


def run(name: str) -> None:
    """Runs a table's command.

    Raises:
      NoResult: it failed.
    """
    (ROOT / "runs" / "measured").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "PYTHONPATH": str(ROOT)}
    print(TABLES[name].command, flush=True)
    done = subprocess.run(["bash", "-euc", TABLES[name].command], cwd=ROOT, env=environment)
    if done.returncode:
        raise NoResult(f"{name}: its command ended with status {done.returncode}; mend that and run docs/measure.py "
                       f"{name} again")


def read(name: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table as it follows from its command's results.

    Args:
      name: of the table.
      before: the table as it is stored, whose title and note are kept.

    Raises:
      NoResult: the results are not there.
    """
    table = TABLES[name]
    files = tables.results(table, ROOT)
    if not files:
        raise NoResult(f"{name}: there is no {table.result}; run docs/measure.py {name}, which needs {table.needs}")
    columns, *rows = table.rows([json.loads(file.read_text()) for file in files])
    written = datetime.date.fromtimestamp(max(file.stat().st_mtime for file in files))
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in table.packages)
    made = {"title": before.get("title", name), "columns": columns, "rows": rows, "command": table.command,
            "machine": machine(table), "versions": versions, "date": written.isoformat()}
    return made | ({"note": before["note"]} if before.get("note") else {})


def changes(before: Rows, after: Rows) -> Iterator[str]:
    """Yields a line for every figure that changed, came or went.

    Args:
      before: the columns, then the rows.
      after: the same.
    """
    old, new = _cells(before), _cells(after)
    for row, number, column in [*new, *(key for key in old if key not in new)]:
        was, now = old.get((row, number, column)), new.get((row, number, column))
        if was != now:
            name = f"{row} ({number})" if number > 1 else row
            yield f"{name} | {column}: {was or 'nothing'} -> {now or 'nothing'}{_by_how_much(was or '', now or '')}"


def _cells(table: Rows) -> dict[tuple[str, int, str], str]:
    """Returns every cell by its row's first cell, the number of rows so far that begin with it, and its column."""
    seen, cells = Counter[str](), {}
    columns, *rows = table or [[]]
    for row in rows:
        seen[row[0]] += 1
        cells |= {(row[0], seen[row[0]], column): cell for column, cell in zip(columns, row, strict=True)}
    return cells


def _by_how_much(was: str, now: str) -> str:
    """Returns the change of a cell's numbers in per cent, in brackets; '' where they can't be compared."""
    pairs = [[float(text.replace(",", "").replace("−", "-")) for text in NUMBER.findall(cell)] for cell in (was, now)]
    if not pairs[0] or len(pairs[0]) != len(pairs[1]) or 0 in pairs[0]:
        return ""
    return f" ({', '.join(f'{100 * (new / old - 1):+.1f} %' for old, new in zip(*pairs, strict=True))})"


def store(name: str, *, runs: bool) -> None:
    """Makes a table again, prints what changed, and writes it.

    Args:
      name: of the table.
      runs: whether its command is run first; else its earlier results are read.
    """
    path = front_page.MEASURED / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if runs:
        run(name)
    after = read(name, before)
    old, new = ([table["columns"], *table["rows"]] if table else [] for table in (before, after))
    lines = list(changes(old, new))
    print(f"{name}: {f'{len(lines)} figures changed' if lines else 'no figure changed'}")
    print("".join(f"    {line}\n" for line in lines), end="")
    write_atomically(path, json.dumps(after, indent=1, ensure_ascii=False) + "\n")


def listing() -> str:
    """Returns a line for each stored table: its age in days, what making it again needs, and where it comes from."""
    lines = []
    for name in sorted({*stored_names(), *TABLES}):
        age = "not stored"
        if name in stored_names():
            date = datetime.date.fromisoformat(front_page.stored(name)["date"])
            age = f"{(datetime.date.today() - date).days} days"
        needs = TABLES[name].needs if name in TABLES else "can't be made again by a command: its note says why"
        lines.append(f"{name:20} {age:>10}   {needs}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Runs the command line; returns an error's line, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TABLES, []], metavar="NAME", help="tables; --list names them")
    parser.add_argument("--list", action="store_true", help="list the tables, their age and what they need")
    parser.add_argument("--read", action="store_true", help="read results that are there; run nothing")
    parser.add_argument("--check", action="store_true", help="fail where the README has other figures")
    given = parser.parse_args(arguments)
    if given.list:
        print(listing())
    elif given.check:
        text = front_page.README.read_text()
        if text != front_page.with_stored_tables(text):
            return "error: README.md has other figures than docs/measured: run python docs/front_page.py"
    elif not given.names:
        parser.error("name tables to make again; --list names them")
    else:
        try:
            for name in given.names:
                store(name, runs=not given.read)
        except NoResult as error:
            return f"error: {error}"
        front_page.README.write_text(front_page.with_stored_tables(front_page.README.read_text()))
    return None


if __name__ == "__main__":
    sys.exit(main())
