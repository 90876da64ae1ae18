"""Tables as text: Markdown and LaTeX. Each model has a line of figures and, below it, one for each retention."""

from collections.abc import Mapping

from vocojax.evaluation.retention import percent
from vocojax.evaluation.tables.table import Row, Table

RETENTION = "(x − lower)/(upper − lower)"
OF_UPPER = "x/upper"
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", ">": "$>$", "<": "$<$"}


def lines_of(table: Table) -> list[list[str]]:
    """Returns the table's cells, line by line, the head first.

    A figure that is missing is `failed` where the row has a problem there, and `–` where it is not known.
    """
    titles = [column.title for column in table.columns]
    mean = ["mean"] if table.has_bounds else []
    lines = [["model", "tokens", *titles, *mean]]
    for row in table.rows:
        tokens = "" if row.tokens is None else f"{row.tokens:,}"
        lines.append([row.name, tokens, *(_figure(table, row, title) for title in titles), *[""] * len(mean)])
        if table.has_bounds:
            kept = table.retention(row)
            lines.append(_shares(RETENTION, titles, kept.retention, kept.mean_retention))
            lines.append(_shares(OF_UPPER, titles, kept.of_upper, kept.mean_of_upper))
    return lines


def markdown(table: Table) -> str:
    """Returns the table in Markdown, aligned so that it can be read in a terminal too."""
    lines = lines_of(table)
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    aligned = [" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    rows = [f"| {line} |" for line in aligned]
    remarks = "".join(f"\n* {remark}" for remark in table.remarks)
    return "\n".join([f"{table.layout.name}: {table.layout.caption}", "", rows[0], f"|{rule}|", *rows[1:], ""]) + (
        remarks + "\n" if remarks else "")


def latex(table: Table) -> str:
    """Returns the table in LaTeX, for the package booktabs."""
    head, *lines = [[_escaped(cell) for cell in line] for line in lines_of(table)]
    body = []
    for number, line in enumerate(lines):
        is_share = table.has_bounds and number % 3
        cells = [rf"\quad\footnotesize {line[0]}", *(rf"\footnotesize {cell}" if cell else "" for cell in line[1:])]
        body.append("  " + " & ".join(cells if is_share else line) + r" \\")
    return "\n".join([
        r"\begin{table}", r"  \centering", rf"  \caption{{{_escaped(table.layout.caption)}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"  \toprule", "  " + " & ".join(head) + r" \\",
        r"  \midrule", *body, r"  \bottomrule", r"  \end{tabular}",
        *(f"  % {' '.join(remark.split())}" for remark in table.remarks), r"\end{table}", ""])


def _figure(table: Table, row: Row, title: str) -> str:
    if title in row.figures:
        return f"{row.figures[title]:,.1f}"
    benchmark = next(column.benchmark for column in table.columns if column.title == title)
    return "failed" if benchmark in dict(row.problems) else "–"


def _shares(name: str, titles: list[str], shares: Mapping[str, float | None], mean: float | None) -> list[str]:
    return [name, "", *(percent(shares[title]) if title in shares else "" for title in titles), percent(mean)]


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
