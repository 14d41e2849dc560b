"""The report's page in a real browser: sorting, hovering, the keyboard, contrast, and room at 1280 and 400 pixels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest

from clkit.metrics.history import History, HistoryWriter
from clkit.metrics.summary import summary
from clkit.report import write_report

CHECK = """
<script id="check">
  window.problems = [];
  window.onerror = message => window.problems.push(message);
  console.error = console.warn = (...words) => window.problems.push(words.join(" "));
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (rgb(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = () => [...document.body.querySelectorAll("*")].filter(element => {
    if (element.closest("script, svg") || !element.checkVisibility()) return false;
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) return false;
    const [low, high] = [getComputedStyle(element).color, paper(element)].map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map(element => element.outerHTML.slice(0, 200));
  const widths = async source => {
    const found = {};
    for (const width of [400, 1280]) {
      const frame = document.createElement("iframe");
      frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
      frame.srcdoc = source;
      await new Promise(loaded => { frame.onload = loaded; document.body.append(frame); });
      const inside = frame.contentDocument, root = inside.documentElement;
      const sticky = inside.querySelector("tbody th"), table = sticky.closest(".scroll");
      table.scrollLeft = 1000;
      found[width] = {
        needs: root.scrollWidth, has: root.clientWidth,
        figure: inside.querySelector("figure.wide").offsetWidth / inside.querySelector("main").clientWidth,
        run: sticky.getBoundingClientRect().left - table.getBoundingClientRect().left,
        lines: sticky.getClientRects().length,
      };
      frame.remove();
    }
    return found;
  };
  window.onload = async () => {
    const all = document.documentElement.outerHTML;
    const source = "<!DOCTYPE html>" + all.replace(/<script id="check">[^]*?<\\/script>/, "");
    const room = await widths(source);
    const table = document.querySelector("table"), header = table.tHead.rows[0].cells[COLUMN];
    const column = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[COLUMN].textContent));
    header.click();
    const up = column();
    const button = header.querySelector("button");
    button.focus();
    const focused = document.activeElement === button && getComputedStyle(button).outlineStyle !== "none";
    button.click();
    const down = column(), state = header.getAttribute("aria-sort");
    const plot = document.querySelector("[data-panels]");
    plot.scrollIntoView();
    const area = plot.querySelector("svg").getBoundingClientRect();
    const panels = JSON.parse(plot.dataset.panels), [left, top, right, bottom] = panels[0].box;
    const where = {
      clientX: area.left + area.width * (left + 0.75 * (right - left)),
      clientY: area.top + area.height * (top + 0.5 * (bottom - top)), bubbles: true,
    };
    plot.dispatchEvent(new PointerEvent("pointerenter", where));
    plot.dispatchEvent(new PointerEvent("pointermove", where));
    const tip = plot.querySelector(".tip"), box = tip?.getBoundingClientRect();
    const seen = tip?.innerText, within = box && box.left >= 0 && box.right <= innerWidth;
    plot.dispatchEvent(new PointerEvent("pointerleave", where));
    const gone = plot.querySelector(".tip") === null;
    document.querySelectorAll("details").forEach(part => { part.open = true; });
    const contrast = {};
    for (const scheme of ["light", "dark"]) {
      document.documentElement.style.colorScheme = scheme;
      contrast[scheme] = faint();
    }
    const links = [...document.querySelectorAll("nav a")].map(a => document.getElementById(a.hash.slice(1)) !== null);
    const result = document.createElement("pre");
    result.id = "result";
    result.textContent = JSON.stringify(
      { up, down, state, focused, tip: seen, within, gone, contrast, room, links, problems: window.problems });
    document.body.append(result);
  };
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium"),
]


def in_chromium(page, column):
    """Open a page, use it, and return what was seen; ``column`` is sorted by."""
    check = CHECK.replace("COLUMN", str(column))
    page.write_text(page.read_text().replace("<head>", f"<head>{check}", 1))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    options += ["--disable-background-networking", "--no-first-run", "--window-size=1280,900"]
    command = ["chromium", *options, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'<pre id="result">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr[-2000:]
    return json.loads(unescape(found[1]))


def make_run(folder, strategy, seed, final, *, n=5, steps=20, diverged=None, complete=True):
    """A run over n experiences whose old ones fall after each boundary, and end near ``final``."""
    folder.mkdir(parents=True)
    writer = HistoryWriter(folder / "history.csv", n)
    writer.append(0, 0, "init", [0.1] * n)
    for k in range(n):
        for i in range(1, steps + 1):
            old = final + 0.01 * np.arange(k) - 0.4 * np.exp(-((i - 4) ** 2) / 4)
            writer.append(k * steps + i, k, "step", [*old.clip(0, 1), min(0.2 * i, 0.95)])
        writer.append(k * steps + steps, k, "end", [*(final + 0.01 * np.arange(k)), 0.95])
    writer.close()
    if complete:
        names = [f"some digits {k}" for k in range(n)]
        stream = {"name": "digits", "kind": "class-incremental", "experiences": names}
        history = History.read(folder / "history.csv")
        content = summary(history, stream=stream, complete=True, schedule="every step", subset=None, diverged=diverged)
        (folder / "metrics.json").write_text(json.dumps(content))
        (folder / "timing.json").write_text(json.dumps({"training_seconds": 10.0 + seed}))
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(f"- strategy={strategy}\n- seed={seed}\n")
    (folder / ".hydra" / "config.yaml").write_text(json.dumps({"seed": seed, "strategy": {strategy: {}}}))
    (folder / ".hydra" / "hydra.yaml").write_text('{"hydra": {"runtime": {"choices": {"scenario": "split_digits"}}}}')
    begun = {"started": 1.7e9 + seed, "host": "node", "pid": 1, "job": "", "step": 0}
    (folder / "attempts.jsonl").write_text(json.dumps(begun) + "\n" + json.dumps({"ended": 1.7e9 + seed + 90}) + "\n")


METHODS = {"er": 0.8, "ewc_with_a_name_that_is_quite_long_and_says_all": 0.5, "naive": 0.3}


def one_run(root):
    make_run(root / "one", "er", 0, 0.8)
    return root / "one"


def sweep(root):
    for strategy, final in METHODS.items():
        for seed in range(5):
            make_run(root / f"{strategy}{seed}", strategy, seed, final + 0.01 * seed)
    return root


def twenty(root):
    make_run(root / "twenty", "er", 0, 0.6, n=20)
    return root / "twenty"


def diverged(root):
    make_run(root / "lost", "er", 0, 0.05, diverged=5)
    return root / "lost"


def partial(root):
    for strategy, final in METHODS.items():
        for seed in range(3):
            make_run(root / f"{strategy}{seed}", strategy, seed, final + 0.01 * seed, complete=seed < 2)
    (root / ".sweeps").mkdir()
    runs = {f"{strategy}{seed}": [] for strategy in METHODS for seed in range(5)}
    (root / ".sweeps" / "plan.json").write_text(json.dumps({"command": ["seed=range(5)"], "runs": runs}))
    return root


@pytest.fixture(scope="module", params=[one_run, sweep, twenty, diverged, partial], ids=lambda make: make.__name__)
def page(request, tmp_path_factory):
    """A page's kind, its report, its text, and what the browser saw."""
    folder = request.param(tmp_path_factory.mktemp("runs"))
    report = write_report([folder])
    path = folder / "report.html"
    text = path.read_text()
    return request.param.__name__, report, text, in_chromium(path, 1 if len(report.groups) == 1 else 2)


def test_the_console_is_free_of_errors(page):
    assert page[3]["problems"] == []


def test_nothing_is_wider_than_the_page(page):
    for width, room in page[3]["room"].items():
        assert room["needs"] <= room["has"] <= int(width)


def test_figures_fill_the_column(page):
    assert all(room["figure"] > 0.99 for room in page[3]["room"].values())


def test_the_run_column_stays_in_view(page):
    for room in page[3]["room"].values():
        assert abs(room["run"]) < 1
        assert room["lines"] == 1


def test_every_text_can_be_read_on_white_and_on_black(page):
    assert page[3]["contrast"] == {"light": [], "dark": []}


def test_tables_sort_by_mouse_and_by_keyboard(page):
    seen = page[3]
    assert seen["up"] == sorted(seen["up"])
    assert seen["down"] == sorted(seen["up"], reverse=True)
    assert seen["state"] == "descending"
    assert seen["focused"]


def test_a_figure_shows_its_values_under_the_pointer(page):
    seen = page[3]
    first = seen["tip"].splitlines()[0]
    total = 20 * page[1].groups[0].runs[0].history.n_experiences
    assert int(first.removeprefix("step ")) == pytest.approx(0.75 * total, abs=1)
    assert seen["within"]
    assert seen["gone"]


def test_the_contents_lead_to_the_sections(page):
    assert len(page[3]["links"]) >= 4
    assert all(page[3]["links"])


def test_the_head_says_what_was_run_and_the_three_numbers_that_matter(page):
    kind, report, text, _ = page
    head = re.sub(r"<[^>]+>", " ", text[text.index("<header") : text.index("</header>")])
    head = " ".join(unescape(head).split())
    for fact in ("Date:", "Command: clkit train", "Machine: node", "Versions: clkit", "Duration:"):
        assert fact.replace(":", "") in head or kind in ("sweep",)
    if kind == "diverged":
        assert "diverged" in head
        assert "not finite from step 5 on" in head
        return
    # by 40 points, four steps after a boundary
    assert "deepest fall" in head
    assert "while some digits" in head
    best = report.groups[0].estimate("ACC")
    assert str(best) in head
    if kind in ("sweep", "partial"):
        assert "best: er" in head
        second = report.groups[1].estimate("ACC")
        assert f"ahead of ewc_with_a_name_that_is_quite_long_and_says_all {100 * (best.mean - second.mean):.1f}" in head
    if kind == "partial":
        assert "6 of 15 finished" in head


def test_nothing_is_said_twice_of_one_seed(page):
    kind, _, text, _ = page
    assert ("Each run" in text) == (kind in ("sweep", "partial"))
    assert (">seeds<" in text) == (kind in ("sweep", "partial"))


def test_six_metrics_come_first_and_the_rest_on_demand(page):
    text = page[2]
    tables = re.findall(r"<thead>(.*?)</thead>", text)
    names = [re.findall(r"<button[^>]*>(.*?)</button>", table) for table in tables[:2]]
    assert [name.split(" ")[0] for name in names[0]][-6:] == ["ACC", "min-ACC", "WC-ACC", "FORG", "WF10", "AAA"]
    assert len(names[1]) > 12
    assert text.index("All ") < text.index("<thead>", text.index("All "))


def test_a_page_of_two_hundred_runs_stays_usable(tmp_path):
    for setting in range(40):
        for seed in range(5):
            final = 0.4 + 0.01 * setting + 0.01 * seed
            make_run(tmp_path / f"method{setting}_{seed}", f"method{setting}", seed, final, n=2, steps=4)
    report = write_report([tmp_path])
    assert len(report.groups) == 40
    page = tmp_path / "report.html"
    assert page.stat().st_size < 20 * 2**20
    seen = in_chromium(page, 2)
    assert seen["problems"] == []
    assert len(seen["up"]) == 40
    assert seen["up"] == sorted(seen["up"])
