"""The documentation: what it shows is what works, and what is generated is there."""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import markdown
import pytest
import torch
import yaml
from command_line import clkit, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from language import write_tasks

from clkit.run.checkpoint import latest_checkpoint
from clkit.run.inherit import inherited
from clkit.run.train import is_finished
from clkit.testing import small_language_module, small_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import docs_figures
import docs_hooks
from docs_notation import DocstringNotation

ROOT = Path(__file__).parents[1]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [*ROOT.glob("docs/**/*.md")]}
TEXTS["README.md"] = (ROOT / "README.md").read_text("utf-8")
NAMES = [choice.name for choice in docs_hooks.strategies()]


def run_blocks(page: str, **replaced: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        for old, new in replaced.items():
            block = re.sub(rf"^{old} = .*$", f"{old} = {new!r}", block, flags=re.MULTILINE)
        exec(block, names)
    return names


def test_the_page_for_ones_own_trainer_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run_blocks("docs/users/own_trainer.md")
    assert (tmp_path / "replay" / "stability_gap.png").exists()
    assert names["page"] == Path("replay/report.html")
    assert (tmp_path / "replay" / "report.html").exists()
    for folder in ("replay", "monitored", "stopped", "accuracy", "probability", "mine", "features", "resumed"):
        assert is_finished(tmp_path / folder)
    # what the program was told to do again is done already
    weights = [p.detach().clone() for p in names["train"]().parameters()]
    assert all(torch.equal(a, b) for a, b in zip(names["train"]().parameters(), weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "folder"), [("start", "first"), ("coming_from", "moved")])
def test_the_pages_for_newcomers_run(page, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(f"docs/{page}.md")
    assert is_finished(tmp_path / folder)
    assert (tmp_path / folder / "report.html").exists() == (page == "start")


@pytest.mark.slow
def test_the_page_for_sweeps_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = TEXTS["docs/users/sweep.md"]
    config = tmp_path / "configs" / "experiment" / "mine.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(re.search(r"```yaml\n(# @package.*?)```", text, re.DOTALL)[1])
    train, *others = re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1].splitlines()
    fewer = ["strategy=naive,er", "seed=0,1", "data.epochs=1", "scenario.n_experiences=2", "logger=none"]
    for command in ([*shlex.split(train), *fewer], *map(shlex.split, others)):
        done = clkit(*command[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "er" in done.stdout
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    run_blocks("docs/users/sweep.md")
    described = capsys.readouterr().out
    assert "er · split_digits" in described
    assert "2.0" in described


@pytest.fixture
def model_and_tasks(tmp_path, monkeypatch):
    """A folder with a small language model and two tasks, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small_language_module(adapter=None).net.save_pretrained("model")
    small_tokenizer().save_pretrained("model")
    write_tasks(tmp_path / "data" / "instructions", ("sums", "colours"))
    return tmp_path


@pytest.mark.slow
def test_the_command_for_language_models_runs(model_and_tasks):
    block = re.search(r"```console\n(clkit train scenario=instructions.*?)```", TEXTS["docs/users/llm.md"], re.DOTALL)[
        1
    ]
    train, report = block.replace("\\\n", " ").replace("NAME_OR_PATH", "model").splitlines()
    few = ["trainer=cpu", "logger=none", "data.epochs=1", "evaluation.subset=4", "hydra.run.dir=runs/one"]
    for command in ([*shlex.split(train), *few], shlex.split(report)):
        done = clkit(*command[1:], cwd=model_and_tasks)
        assert done.returncode == 0, done.stderr
    assert "Generated answers" in (model_and_tasks / "runs" / "one" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_the_page_for_streams_that_grow_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("docs/users/grow.md")
    state = torch.load(latest_checkpoint("checkpoints"), weights_only=True)["StreamDataModule"]
    assert [about["name"] for about in state["experiences"]] == ["0-1", "2-3", "4-5"]
    assert len(names["february"]) == 1


def test_the_page_for_language_models_runs(model_and_tasks):
    tmp_path = model_and_tasks
    run_blocks("docs/users/llm.md", NAME=str(tmp_path / "model"))
    assert is_finished(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "answers.json").exists()
    assert (tmp_path / "run" / "adapters" / "experience_1" / "live" / "adapter_config.json").exists()


def test_the_page_for_hugging_faces_trainer_runs(model_and_tasks):
    names = run_blocks("docs/users/hugging_face.md", NAME=str(model_and_tasks / "model"))
    assert is_finished(model_and_tasks / "hugging_face")
    assert (model_and_tasks / "hugging_face" / "checkpoint-20" / "clkit.ckpt").exists()
    assert names["trainer"].state.global_step == 40


def commands() -> list[str]:
    blocks = [block for text in TEXTS.values() for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [
        f"clkit train {shlex.join(docs_figures.overrides(name))}" for name in NAMES if name not in docs_figures.TEXTS
    ]
    return [line for line in [*lines, *shown] if line.startswith("clkit train")]


def said(command: str, folder: Path) -> list[str]:
    """The words of a command, with those of the run that it goes on from."""
    words = [word for word in shlex.split(command, comments=True)[2:] if word != "-m"]
    run = next((word.removeprefix("from=").partition("@")[0] for word in words if word.startswith("from=")), None)
    if run is not None:
        makers = (line for line in commands() if f"hydra.run.dir={run}" in shlex.split(line, comments=True))
        there = said(next(makers, "clkit train scenario=instructions model=causal_lm model.net=NAME"), folder / run)
        there = [word for word in there if not word.startswith("from=")]
        (folder / run / ".hydra").mkdir(parents=True)
        (folder / run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(there))
        words = inherited([word.replace("from=", f"from={folder}/") for word in words])
    return [word for word in words if not word.startswith("hydra")]


@pytest.mark.parametrize("command", commands())
def test_every_command_composes(command, tmp_path):
    words = said(command, tmp_path)
    chosen = []
    for override in OverridesParser.create().parse_overrides(words):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.input_line]
        chosen.append(f"{override.get_key_element()}={values[0]}" if override.is_sweep_override() else values[0])
    composed(*chosen)


def test_every_strategy_has_a_page_with_its_paper_and_configuration():
    pages = docs_hooks.pages()
    assert set(pages) == {f"methods/{path.stem}.md" for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    for name in NAMES:
        config, page = (ROOT / "conf" / "strategy" / f"{name}.yaml").read_text("utf-8"), pages[f"methods/{name}.md"]
        assert config in page
        assert set(re.findall(r"arXiv \d{4}\.\d{5}", config)) <= set(re.findall(r"arXiv \d{4}\.\d{5}", page))
        assert f"strategy={name}" in page or name in (*docs_figures.BEHIND_A_MEMORY, *docs_figures.TEXTS)


def test_pages_of_methods_have_the_methods_names_as_titles():
    titles = {choice.name: docs_hooks.method(choice) for choice in docs_hooks.strategies()}
    assert titles["er"] == "Experience replay"
    assert titles["ewc"] == "Elastic weight consolidation"
    assert titles["derpp"] == "DER++"
    assert len(set(titles.values())) == len(titles)
    for name, page in docs_hooks.pages().items():
        assert page.startswith(f"# {titles[name[len('methods/') : -len('.md')]]}\n")


def render(text: str) -> str:
    return markdown.markdown(text, extensions=["fenced_code", DocstringNotation()])


def test_formulas_become_mathml():
    drawn = render("Before\n\n.. math:: a =\n    \\mathcal L(B)\n\n    + b, \\qquad c\n\nbetween :math:`x_1` after")
    assert drawn.count("<math") == 2
    assert drawn.count('display="block"') == 1
    assert "<mi>ℒ</mi>" in drawn
    assert "math::" not in drawn
    assert re.search(r"<p>between <math.*</math> after</p>", drawn)


def test_a_formula_in_a_list_stays_in_it():
    drawn = render("- one\n\n    .. math:: a\n        + b\n\n- two :math:`c`")
    assert drawn.count("<li>") == 2
    assert drawn.index("<math") < drawn.index("two")


def test_the_notation_is_left_alone_in_blocks_of_code():
    drawn = render("```\n:math:`a`\n.. math:: b\n```")
    assert drawn == "<pre><code>:math:`a`\n.. math:: b\n</code></pre>"


def test_a_session_of_python_becomes_code():
    drawn = render("Text.\n>>> f(1)\n<class>\n\nMore.")
    assert "<pre><code>&gt;&gt;&gt; f(1)\n&lt;class&gt;\n</code></pre>" in drawn
    assert "<p>More.</p>" in drawn


def test_references_and_papers_become_links():
    drawn = render("See :class:`~clkit.data.stream.Stream`, :func:`main` and arXiv 2205.13452.")
    assert '<autoref identifier="clkit.data.stream.Stream" optional><code>Stream</code></autoref>' in drawn
    assert "<code>main</code>" in drawn
    assert '<a href="https://arxiv.org/abs/2205.13452">arXiv 2205.13452</a>' in drawn


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    if sys.version_info < (3, 11):
        command.remove("-P")
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_and_every_formula_is_drawn(site):
    for name in NAMES:
        page = (site / "methods" / f"{name}.html").read_text("utf-8")
        assert "arXiv" not in docs_hooks.pages()[f"methods/{name}.md"] or "https://arxiv.org/abs/" in page
        doc = docs_hooks._about(docs_hooks._target(next(c for c in docs_hooks.strategies() if c.name == name)))
        assert page.count('<div class="formula"><math') >= doc.count(".. math::")
    for path in site.rglob("*.html"):
        prose = re.sub(r"<(pre|code).*?</\1>", "", path.read_text("utf-8"), flags=re.DOTALL)
        assert not re.search(r":(math|class|func|meth|mod|data|attr):|\.\. math::", prose), path


@pytest.mark.slow
def test_the_page_on_plugins_shows_the_files_of_the_example(site):
    shown = html.unescape(re.sub(r"<[^>]+>", "", (site / "plugin.html").read_text("utf-8")))
    example = ROOT / "examples" / "clkit_example_plugin"
    for name in ("pyproject.toml", "clkit_example/er_ace.py", "clkit_example/dimmed.py", "tests/test_er_ace.py"):
        lines = [line for line in (example / name).read_text("utf-8").splitlines() if line]
        assert [line for line in lines if line not in shown] == []


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]+)"', page)
        loaded += re.findall(r'<link[^>]*\brel="(?:stylesheet|icon|preconnect)"[^>]*\bhref="([^"]+)"', page)
        assert loaded
        assert not [url for url in loaded if "//" in url], path
    for path in [*site.rglob("*.css")]:
        assert not re.search(r"url\((['\"]?)https?:", path.read_text("utf-8"))


SEARCH = """
<script>
  window.addEventListener("load", async () => {
    const input = document.querySelector("[data-md-component=search-query]");
    const results = () => [...document.querySelectorAll(".md-search-result__item h1")].map(title => title.textContent);
    for (let tried = 0; tried < 100 && !results().length; tried++) {
      input.focus();
      input.value = "replay";
      input.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
      await new Promise(done => setTimeout(done, 100));
    }
    document.body.innerHTML = `<pre id="result">${JSON.stringify(results())}</pre>`;
  });
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("page", ["index.html", "methods/ewc.html"])
def test_the_search_works_in_pages_opened_from_a_folder(page, site, tmp_path):
    shown = site / page.replace(".html", "_searched.html")
    shown.write_text((site / page).read_text("utf-8").replace("</body>", f"{SEARCH}</body>"), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--no-first-run"]
    command = ["chromium", *options, "--virtual-time-budget=20000", "--dump-dom", shown.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    shown.unlink()
    found = re.search(r'<pre id="result">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr[-2000:]
    assert "Experience replay" in html.unescape(found[1])


@pytest.mark.slow
def test_the_figure_of_a_method_is_drawn_once(tmp_path, monkeypatch):
    for name, folder in {"CACHE": tmp_path, "FIGURES": tmp_path / "figures", "_WEIGHTS": tmp_path / "vit.pt"}.items():
        monkeypatch.setattr(docs_figures, name, folder)
    folder = docs_figures.history_of("ewc")
    changed = (folder / "history.csv").stat().st_mtime_ns
    assert is_finished(folder)
    assert docs_figures.history_of("ewc") == folder
    assert (folder / "history.csv").stat().st_mtime_ns == changed
