"""The report as one HTML page that needs no network: numbers, tables, inline figures, configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from string import Template

import numpy as np
import yaml  # type: ignore[import-untyped]
from matplotlib.figure import Figure

from clkit.report.definitions import higher_is_better, scale
from clkit.report.figures import curves, save
from clkit.report.figures.canvas import GRID, INK, PAPER, RULE, SOFT, line_styles, readable, style
from clkit.report.head import Number
from clkit.report.runs import Group
from clkit.report.tables import HEADLINES, metric_names, results_table

_TEMPLATE = Path(__file__).with_name("report.html")
_DARK = "#12171D"
_N_COLORS = 8
_COLOR = re.compile(r"#[0-9a-f]{6}\b")


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its contents.

    Args:
        title: Its heading.
        content: HTML.
    """

    title: str
    content: str

    @property
    def anchor(self) -> str:
        """What the contents link to."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def html(self) -> str:
        """The section under its heading."""
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>\n{self.content}</section>\n'


def page(
    title: str,
    about: Mapping[str, str],
    numbers: Sequence[Number],
    sections: Iterable[Section],
) -> str:
    """Return the page: what was run, the numbers that matter, and the sections that are not empty."""
    shown = [section for section in sections if section.content]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        theme="".join(f"    --{name}: light-dark({light}, {dark});\n" for name, (light, dark) in theme().items()),
        swatches="".join(f"  .swatch-{number}::before {{ color: var(--c{number}); }}\n" for number in range(_N_COLORS)),
        about="".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>\n" for key, value in about.items()),
        numbers="".join(map(_number, numbers)),
        contents="".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>\n' for s in shown),
        sections="".join(section.html() for section in shown),
    )


def theme() -> dict[str, tuple[str, str]]:
    """Colours of the page by name: on white and on black. ``c0`` is the first line's, ``t0`` that of text about it."""
    found = {
        "paper": (PAPER, _DARK),
        "ink": (INK, "#E4E8ED"),
        "soft": (SOFT, "#A5B1BE"),
        "rule": (RULE, "#66727F"),
        "grid": (GRID, "#2A323B"),
        "panel": ("#F5F7FA", "#1A2129"),
        "bar": ("#9CC3DF", "#2F6690"),
        "warn": ("#8D2B0B", "#F0A080"),
        "link": ("#00598C", "#6CB8EA"),
    }
    with style():
        colors = [look["color"] for look in line_styles(_N_COLORS)]
    for number, color in enumerate(colors):
        light = readable(color, _DARK)
        found |= {f"c{number}": (color, light), f"t{number}": (readable(color), light)}
    return found


def results(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """The table of results: bars behind percentages, the best of each column in bold."""
    table = results_table(groups, metrics)
    values = np.array([[group.estimate(metric).mean for metric in metrics] for group in groups])
    best = [_best(column, metric, groups) for column, metric in zip(values.T, metrics, strict=True)]
    marks: dict[tuple[int, int], str] = {}
    for row, column in np.ndindex(values.shape):
        percent = values[row, column] * scale(metrics[column])
        bar = f' style="--v:{percent:.1f}"' if scale(metrics[column]) == 100 and 0 < percent <= 100 else ""
        marks[row, column + len(table.header) - len(metrics)] = bar + (
            ' class="best"' if len(groups) > 1 and row == best[column] else ""
        )
    if len(groups) > 1:
        marks |= {(row, 0): f' class="swatch-{row}"' for row in range(min(len(groups), _N_COLORS))}
    return table.html(marks)


def _best(column: np.ndarray, metric: str, groups: Sequence[Group]) -> int:
    sound = np.array([np.nan if group.diverged else value for value, group in zip(column, groups, strict=True)])
    if np.isnan(sound).all():
        return -1
    return int(np.nanargmax(sound) if higher_is_better(metric) else np.nanargmin(sound))


def main_metrics(groups: Sequence[Group]) -> list[str]:
    """Names of the metrics that are shown first."""
    names = metric_names(groups)
    return [name for name in HEADLINES if name in names]


def more(summary: str, content: str, *, shown: bool = False) -> str:
    """What is shown when it is asked for."""
    opened = " open" if shown else ""
    return f"<details{opened}><summary>{escape(summary)}</summary>\n{content}</details>\n" if content else ""


def listed(texts: Sequence[str]) -> str:
    """A list."""
    items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul>{items}</ul>\n" if texts else ""


def pair(*parts: str) -> str:
    """Parts side by side where there is room."""
    return f'<div class="pair">{"".join(parts)}</div>\n'


def drawn(name: str, figure: Figure, caption: str = "", *, themed: bool = True) -> str:
    """A figure that shows its values; it follows the page into the dark unless it has a style of its own."""
    data, svg = json.dumps(curves(figure), separators=(",", ":")), _inline(figure, themed)
    if themed:
        data, svg = _themed(data), _themed(svg)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = "wide" if figure.get_figwidth() > 6 else "small"
    return (
        f'<figure class="{kind}"><div class="plot" role="img" aria-label="{escape(name)}" '
        f'data-panels="{escape(data)}">{svg}</div>{below}</figure>\n'
    )


def configuration(group: Group) -> str:
    """The configuration of a group's first run, empty without one."""
    if not group.runs[0].config:
        return ""
    text = yaml.safe_dump(dict(group.runs[0].config), sort_keys=False, allow_unicode=True)
    return f"<pre>{escape(text)}</pre>\n"


def _number(number: Number) -> str:
    return (
        f'<div class="number"><em>{escape(number.label)}</em><strong>{escape(number.value)} '
        f"<small>{escape(number.unit)}</small></strong><span>{escape(number.note)}</span></div>\n"
    )


def _inline(figure: Figure, transparent: bool) -> str:
    out = StringIO()
    save(figure, out, "svg", transparent=transparent or None)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def _themed(text: str) -> str:
    names = {light.lower(): f"var(--{name})" for name, (light, _) in reversed(theme().items())}
    return _COLOR.sub(lambda found: names.get(found[0], found[0]), text)
