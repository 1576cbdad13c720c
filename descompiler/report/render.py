"""Renderings of a sheet: a terminal, JSON, Markdown, LaTeX and HTML.

JSON keeps SI values, the others are for people. Plain text is `descompiler.sheet.to_text`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import rich.table
import sympy
from rich.console import Console
from rich.text import Text
from sympy.printing.mathml import mathml

from descompiler.sheet import Column, Sheet, text_of


def to_rich(sheet: Sheet) -> rich.table.Table:
    """For a terminal."""
    table = rich.table.Table(
        title=Text(sheet.title), title_justify="left", box=rich.box.SIMPLE_HEAD, title_style="bold"
    )
    for c in sheet.columns:
        table.add_column(
            c.title, justify="right" if c.is_number else "left", no_wrap=c.is_number, overflow="fold", vertical="top"
        )
    for number, row in enumerate(sheet.rows):
        cells = (Text(text_of(x, c.unit)) for x, c in zip(row, sheet.columns, strict=True))
        table.add_row(*cells, style="bold green" if number in sheet.strong else None)
    return table


def print_rich(sheets: Sequence[Sheet], console: Console) -> None:
    """Print tables and their notes; a pipe gets whole lines, however long."""
    for sheet in sheets:
        console.print(to_rich(sheet))
        for note in sheet.notes:
            console.print(Text(f" {note}", style="dim"))
        console.print()


def to_json(sheets: Sequence[Sheet], **more: Any) -> str:
    """JSON: ``{"sheets": [{"title", "columns": [{"title", "unit"}], "rows": [{title: value}], "notes"}], ...}``."""
    data = [
        {
            "title": s.title,
            "columns": [{"title": c.title, "unit": c.unit} for c in s.columns],
            "rows": [{c.title: _plain(x, c.unit) for x, c in zip(row, s.columns, strict=True)} for row in s.rows],
            "chosen": sorted(s.strong),
            "notes": list(s.notes),
        }
        for s in sheets
    ]
    return json.dumps({**more, "sheets": data}, indent=1, ensure_ascii=False)


def _plain(value: Any, unit: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if unit in ("formula", "text"):
        return str(value)
    number = float(value)
    return int(number) if number.is_integer() else number


def to_markdown(sheet: Sheet) -> str:
    """A GitHub-flavoured Markdown table; emphasised rows are bold.

    >>> columns = (Column("strategy"), Column("sent", "bytes"))
    >>> sheet = Sheet("bytes", columns, (("unique rows", 24_685_069), ("whole", None)))
    >>> print(to_markdown(sheet))
    **bytes**
    <BLANKLINE>
    | strategy | sent |
    |:--|--:|
    | unique rows | 24.7 MB |
    | whole | – |
    """

    def cell(value: Any, column: Column, strong: bool) -> str:
        if column.unit == "formula" and value not in (None, ""):
            text = f"`{value}`"
        else:
            text = text_of(value, column.unit)
        text = _markdown(text)
        return f"**{text}**" if strong and text and not text.startswith("`") else text

    lines = [f"**{_markdown(sheet.title)}**", ""]
    lines.append("| " + " | ".join(c.title.replace("|", "\\|") for c in sheet.columns) + " |")
    lines.append("|" + "|".join("--:" if c.is_number else ":--" for c in sheet.columns) + "|")
    for number, row in enumerate(sheet.rows):
        cells = (cell(x, c, number in sheet.strong) for x, c in zip(row, sheet.columns, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    for note in sheet.notes:
        lines += ["", _markdown(note)]
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """Text in which no name is taken for HTML, or for the border of a cell."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "–": "--",
    "µ": r"\textmu{}",
    "×": r"$\times$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "·": r"$\cdot$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "→": r"$\to$",
}


def latex_text(text: str) -> str:
    r"""Text with LaTeX's special characters escaped.

    >>> latex_text("50 % of A_1 & B")
    '50 \\% of A\\_1 \\& B'
    """
    return "".join(_LATEX.get(c, c) for c in text)


def to_latex(sheet: Sheet) -> str:
    """A LaTeX ``table`` environment for the ``booktabs`` package."""

    def cell(value: Any, column: Column, strong: bool) -> str:
        if column.unit == "formula" and value not in (None, ""):
            return f"${sympy.latex(value)}$"
        text = latex_text(text_of(value, column.unit))
        return rf"\textbf{{{text}}}" if strong else text

    lines = [
        r"\begin{table}",
        rf"\caption{{{latex_text(sheet.title)}}}",
        rf"\begin{{tabular}}{{{''.join('r' if c.is_number else 'l' for c in sheet.columns)}}}",
        r"\toprule",
        " & ".join(latex_text(c.title) for c in sheet.columns) + r" \\",
        r"\midrule",
    ]
    for number, row in enumerate(sheet.rows):
        cells = (cell(x, c, number in sheet.strong) for x, c in zip(row, sheet.columns, strict=True))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {latex_text(note)}" for note in sheet.notes]
    return "\n".join([*lines, r"\end{table}"])


def to_html(sheet: Sheet) -> str:
    """A ``figure`` with a ``table``; formulas are MathML."""

    def cell(value: Any, column: Column) -> str:
        if column.unit == "formula" and value not in (None, ""):
            return f"<td class='formula'>{to_mathml(value)}</td>"
        text = html.escape(text_of(value, column.unit))
        return f"<td class='number'>{text}</td>" if column.is_number else f"<td>{_breakable(text)}</td>"

    head = "".join(
        f"<th scope='col'{' class=number' if c.is_number else ''}>{html.escape(c.title)}</th>" for c in sheet.columns
    )
    lines = ["<figure class='sheet'>", f"<figcaption>{html.escape(sheet.title)}</figcaption>"]
    lines += ["<div class='scroll'><table>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for number, row in enumerate(sheet.rows):
        cells = "".join(cell(x, c) for x, c in zip(row, sheet.columns, strict=True))
        lines.append(f"<tr{' class=chosen' if number in sheet.strong else ''}>{cells}</tr>")
    lines += ["</tbody></table></div>"]
    lines += [f"<p class='note'>{html.escape(n)}</p>" for n in sheet.notes]
    return "\n".join([*lines, "</figure>"])


def to_mathml(expression: Any) -> str:
    """Presentation MathML of a sympy expression, which browsers show without any library."""
    if isinstance(expression, str):
        return f"<code>{html.escape(expression)}</code>"
    return f"<math displaystyle='true'>{mathml(expression, printer='presentation')}</math>"


def _breakable(text: str) -> str:
    """Escaped text that may break after the dots and slashes of long names."""
    return re.sub(r"([./_])(?=\w)", r"\1<wbr>", text)
