"""The report as one HTML page that needs no network: tables, inline figures, configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from string import Template

import yaml  # type: ignore[import-untyped]
from matplotlib.figure import Figure

from clkit.report.figures import curves, save
from clkit.report.runs import Group
from clkit.report.tables import Table

_TEMPLATE = Path(__file__).with_name("report.html")


def page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    groups: Sequence[Group],
    details: Sequence[Table],
) -> str:
    """Return the page: notes, tables and figures, then the details and the configuration of each group."""
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        notes="".join(f"<li>{escape(note)}</li>\n" for note in notes),
        tables="".join(table.html() for table in tables if table.rows),
        figures="".join(_figure(name, figure) for name, figure in figures.items()),
        details="".join(table.html() for table in details if table.rows),
        configs="".join(_config(group) for group in groups if group.runs[0].config),
    )


def _figure(name: str, figure: Figure) -> str:
    data = escape(json.dumps(curves(figure), separators=(",", ":")))
    return f'<figure role="img" aria-label="{escape(name)}" data-panels="{data}">{_inline(figure)}</figure>\n'


def _inline(figure: Figure) -> str:
    out = StringIO()
    save(figure, out, "svg")
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _config(group: Group) -> str:
    text = yaml.safe_dump(dict(group.runs[0].config), sort_keys=False, allow_unicode=True)
    return f"<details><summary>{escape(group.label)}: configuration</summary><pre>{escape(text)}</pre></details>\n"
