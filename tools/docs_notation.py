"""The notation of clkit's docstrings in Markdown: formulas as MathML, cross references, papers.

``:math:`x``` and ``.. math::`` become MathML, which browsers draw without any script; ``:class:`~clkit.Stream``` and
its like become links where the name is documented; ``arXiv 2205.13452`` becomes a link.
"""

from __future__ import annotations

import re
import unicodedata
from html import escape
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *(?=\n\1 +\S)))*)", re.MULTILINE)
_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
_SCRIPT = re.compile(r'<mi mathvariant="script">([A-Z])</mi>')


def mathml(formula: str, display: str = "inline") -> str:
    """Return a LaTeX formula as MathML.

    Browsers ignore ``mathvariant``, so calligraphic capitals become characters of their own.
    """
    html = convert(" ".join(formula.split()), display=display)
    return _SCRIPT.sub(lambda found: f"<mi>{_script(found[1])}</mi>", html)


def _script(letter: str) -> str:
    for name in (f"SCRIPT CAPITAL {letter}", f"MATHEMATICAL SCRIPT CAPITAL {letter}"):
        try:
            return unicodedata.lookup(name)
        except KeyError:
            continue
    raise ValueError(letter)


class _Blocks(Preprocessor):
    """Replaces ``.. math::`` and the indented lines below it, and makes sessions of Python blocks of code."""

    def run(self, lines: list[str]) -> list[str]:
        text = _BLOCK.sub(self._replace, "\n".join(lines))
        text = _DOCTEST.sub(lambda found: "\n" + re.sub("^", "    ", found[0], flags=re.MULTILINE), text)
        return re.sub(r"(?<=\w)::$", ":", text, flags=re.MULTILINE).split("\n")

    def _replace(self, found: re.Match[str]) -> str:
        html = f'<div class="formula">{mathml(found[2], "block")}</div>'
        return f"\n{found[1]}{self.md.htmlStash.store(html)}\n"


class _Role(InlineProcessor):
    """``:math:`...``` and references such as ``:func:`~package.name```."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[ElementTree.Element | str, int, int]:
        role, content = m[1], m[2]
        if role == "math":
            return self.md.htmlStash.store(mathml(content)), m.start(0), m.end(0)
        name = content.lstrip("~")
        shown = name.rpartition(".")[2] if content.startswith("~") else name
        html = f'<autoref identifier="{escape(name)}" optional><code>{escape(shown)}</code></autoref>'
        return self.md.htmlStash.store(html if "." in name else f"<code>{escape(shown)}</code>"), m.start(0), m.end(0)


class _Paper(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[ElementTree.Element, int, int]:
        link = ElementTree.Element("a", href=f"https://arxiv.org/abs/{m[1]}")
        link.text = f"arXiv {m[1]}"
        return link, m.start(0), m.end(0)


class DocstringNotation(Extension):
    """Markdown extension for all of the above."""

    def extendMarkdown(self, md: Markdown) -> None:
        # after code blocks are taken out (25), before HTML is (20)
        md.preprocessors.register(_Blocks(md), "clkit-blocks", 22)
        # before `code` (190)
        md.inlinePatterns.register(_Role(r":(\w+):`([^`]+)`", md), "clkit-roles", 195)
        md.inlinePatterns.register(_Paper(r"arXiv\s+(\d{4}\.\d{4,5})", md), "clkit-papers", 110)
