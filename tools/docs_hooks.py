"""Hooks of mkdocs (see mkdocs.yml): pages from docstrings and configs, and figures that tools/docs_figures.py drew."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import yaml
from docs_figures import FIGURES, command
from docs_notation import DocstringNotation
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from clkit.metrics.online import StabilityGapMetrics
from clkit.report.definitions import define, title
from clkit.run.plugins import Choice, choices

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / ".cache" / "docs" / "source"
_PACKAGES = ("strategies", "scenarios", "conf")


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the notation of docstrings, the source as it is installed, and the methods to the navigation."""
    config.markdown_extensions.append(DocstringNotation())  # type: ignore[arg-type]
    _link_source()
    for section in config.nav or []:
        if "Methods" in section:
            section["Methods"] += [{method(choice): f"methods/{choice.name}.md"} for choice in strategies()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each method, and the figures there are."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    for figure in sorted(FIGURES.glob("*.svg")):
        files.append(File.generated(config, f"methods/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in ``<!-- clkit: NAME -->`` and ``<!-- clkit: members MODULE -->``."""

    def fill(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return _FILLED[name](*arguments)

    return re.sub(r"<!-- clkit: ([\w. ]+) -->", fill, markdown)


def strategies() -> list[Choice]:
    """The strategies of clkit itself."""
    return [choice for choice in choices("strategy") if choice.origin == "clkit"]


def method(choice: Choice) -> str:
    """The name of a method: what its description begins with."""
    return re.split(r"[:,.(]| from | on ", choice.description)[0].strip()


def pages() -> dict[str, str]:
    """Return the generated pages, path to Markdown."""
    first: dict[str, str] = {}
    return {f"methods/{choice.name}.md": _method(choice, first) for choice in strategies()}


def _method(choice: Choice, first: dict[str, str]) -> str:
    text, target = _yaml(choice), _target(choice)
    page = first.setdefault(target, choice.name)
    parts = [f"# {method(choice)}", choice.description, f"In the shell `strategy={choice.name}`."]
    if page == choice.name:
        parts.append(f"::: {target}\n    options:\n      show_root_heading: true\n      members: false")
    else:
        parts += [_about(target), f"Parameters: [`{target}`][{target}]; the page of [{page}]({page}.md)."]
    parts += [
        "## Configuration",
        f"The defaults, `conf/strategy/{choice.name}.yaml`; change them by `strategy.{choice.name}.KEY=VALUE`.",
        f"```yaml\n{text}```",
        "## A run",
        *command(choice.name),
    ]
    if (FIGURES / f"{choice.name}.svg").is_file():
        parts.append(
            f"![Accuracy of every experience at every step of a run with {choice.name}]({choice.name}.svg)\n\n"
            "One seed, default settings: an illustration of how the method behaves, no comparison of methods."
        )
    return "\n\n".join(parts) + "\n"


def _yaml(choice: Choice) -> str:
    return files("clkit.conf").joinpath("strategy", f"{choice.name}.yaml").read_text(encoding="utf-8")


def _target(choice: Choice) -> str:
    return str(yaml.safe_load(_yaml(choice))["_target_"])


def _about(target: str) -> str:
    """The docstring of a class up to its arguments."""
    module, _, name = target.rpartition(".")
    doc = inspect.getdoc(getattr(import_module(module), name)) or ""
    return doc.partition("\nArgs:\n")[0]


def _methods_table() -> str:
    rows = (
        f"| [{method(choice)}]({choice.name}.md) | `{choice.name}` | {choice.description} |\n"
        for choice in strategies()
    )
    return f"| method | strategy | what it does |\n|---|---|---|\n{''.join(rows)}"


def _metrics_table() -> str:
    names = [name for name in StabilityGapMetrics(2).compute() if define(name)]
    return "| metric | meaning |\n|---|---|\n" + "".join(f"| `{title(name)}` | {define(name)} |\n" for name in names)


def _members(module: str) -> str:
    """Documentation of all public names of a module."""
    return "\n\n".join(f"::: {module}.{name}" for name in import_module(module).__all__)


def _classes_table() -> str:
    pages: dict[str, Choice] = {}
    for choice in strategies():
        pages.setdefault(_target(choice), choice)
    rows = (
        f"| [`{target.rpartition('.')[2]}`][{target}] | [{method(choice)}](../methods/{choice.name}.md) |\n"
        for target, choice in pages.items()
    )
    return f"| class | method |\n|---|---|\n{''.join(rows)}"


_FILLED: dict[str, Callable[..., str]] = {
    "classes": _classes_table,
    "members": _members,
    "methods": _methods_table,
    "metrics": _metrics_table,
}


def _link_source() -> None:
    """Lay the packages out as an installation has them: strategies, scenarios and conf lie beside clkit here."""
    package = SOURCE / "clkit"
    package.mkdir(parents=True, exist_ok=True)
    for path in (*(ROOT / "clkit").iterdir(), *(ROOT / name for name in _PACKAGES)):
        link = package / path.name
        if not link.is_symlink() and path.name != "__pycache__":
            link.symlink_to(path)
    for link in package.iterdir():
        if not link.exists():
            link.unlink()
