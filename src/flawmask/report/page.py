"""Self-contained pages: style, script and data are inside. All text from files is escaped."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import flawmask

GENERATOR = "flawmask report"
"""The name of the generator in a page. A page without it is never replaced."""


SCRIPTS = {"gallery": "report.js", "table": "table.js"}


def esc(value: Any) -> str:
    """Return the value's text, safe as the content or a quoted attribute of an HTML element."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table. Its cells must be HTML. The first cell of each row is the row's heading.

    Args:
        head: the column headings.
        rows: a cell per column.
        kind: a class for the style sheet.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Return names and values, given as plain text, as a list of pairs. Values that are None or empty are left out."""
    pairs = (f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in values.items() if shown(value))
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def shown(value: Any) -> bool:
    """Return whether there is anything to show."""
    return value is not None and value not in ("", [])


def section(anchor: str, title: str, *parts: str) -> str:
    """Return a section with a heading and an anchor; an empty text if it has no content."""
    content = "".join(parts)
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>{content}</section>' if content else ""


def page(title: str, body: str, data: Any = None, table: Any = None) -> str:
    """Return a whole page.

    Args:
        title: its title, as text.
        body: its content, as HTML.
        data: the data for the script of the gallery, as JSON values; None for a page without it.
        table: the data for the script of the table, which loads further scripts beside the page; None without it.
    """
    script = ""
    for name, content in (("gallery", data), ("table", table)):
        if content is not None:
            text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
            text = text.replace("<", "\\u003c")
            script += f'<script type="application/json" id="{name}-data">{text}</script>'
            script += f"<script>{_resource(SCRIPTS[name])}</script>"
    return Template(_resource("template.html")).substitute(
        generator=f"{GENERATOR} {flawmask.__version__}",
        title=esc(title),
        style=_resource("report.css"),
        body=body,
        script=script,
        beside="" if table is None else " 'self'",
    )


def _resource(name: str) -> str:
    return (files("flawmask.report") / name).read_text(encoding="utf-8")
