"""Lay out rows of cells below names, so that names are whole however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.text import Text

Group = tuple[str, Sequence[Sequence[str]]]
"""A name, and the rows below it."""


def named_rows(title: str, headings: Sequence[str], groups: Iterable[Group], left: int = 1) -> Text:
    """Return a line per name, and below it its rows.

    Args:
        headings: of the columns; a line break makes two lines of one.
        left: how many columns are aligned to the left, the others to the right.
    """
    heads = [heading.split("\n") for heading in headings]
    above = [head[0] if head[1:] else "" for head in heads]
    lines: list[Sequence[str] | str] = [above, [head[-1] for head in heads]]
    for name, rows in groups:
        lines += [name, *rows]
    cells = [line for line in lines if not isinstance(line, str)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(headings))]
    printed = []
    for line in lines if any(above) else lines[1:]:
        if isinstance(line, str):
            printed.append(f" {line}")
            continue
        aligned = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        printed.append(("   " + "   ".join(aligned)).rstrip())
    heading_lines = 2 if any(above) else 1
    rule = " " + "─" * (max(map(len, printed)) - 1)
    text = Text(f" {title}\n", style="italic", no_wrap=True)
    text.append("\n".join([*printed[:heading_lines], rule, *printed[heading_lines:]]) + "\n", style="not italic")
    return text
