"""The tool that writes domains of raw text, and the experiments on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from command_line import composed

from clkit.errors import ConfigurationError
from clkit.language.text_store import TextFiles
from clkit.metrics.retention_file import Retention
from clkit.run.train import build
from clkit.testing import small_language_module, small_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_text_domains

HAS = {
    "glosses": (make_text_domains.WORDNET / "data.noun").exists(),
    "law": any(make_text_domains.COPYRIGHTS.glob("*/copyright")),
    "code": True,
}


@pytest.mark.parametrize("domain", make_text_domains.DOMAINS)
def test_a_domain_has_its_size_and_no_document_on_both_sides(domain):
    if not HAS[domain]:
        pytest.skip("needs wordnet-base, or Debian's copyright files")
    documents = make_text_domains.DOMAINS[domain]()
    assert len(documents) > 20
    parts = make_text_domains.split(documents, {"test": 5_000, "train": 20_000}, 0)
    for name, size in (("test", 5_000), ("train", 20_000)):
        total = sum(map(len, parts[name]))
        assert size <= total < size + 2 * make_text_domains.PIECE
    assert not set(parts["test"]) & set(parts["train"])
    again = make_text_domains.split(documents, {"test": 5_000, "train": 40_000}, 0)
    assert again["test"] == parts["test"]
    assert make_text_domains.split(documents, {"test": 5_000}, 1)["test"] != parts["test"]
    with pytest.raises(ConfigurationError, match="no text left for train"):
        make_text_domains.split(documents[:1], {"test": 10**9, "train": 10}, 0)


def test_pieces_of_a_long_document_are_the_document():
    text = "".join(f"line {i} {'x' * (i % 90)}\n" for i in range(1000))
    found = make_text_domains.pieces(text)
    assert "".join(found) == text
    assert max(map(len, found)) < make_text_domains.PIECE + 200
    assert make_text_domains.pieces("one") == ["one"]


def test_no_paragraph_of_a_licence_comes_twice(tmp_path, monkeypatch):
    licence = "You may copy this work.\n It comes without any warranty. " * 5
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        own = f"Package {name} has words of its own, many of them. " * 8
        people = f"Copyright: somebody <somebody@{name}.example> and others. " * 5
        (tmp_path / name / "copyright").write_text(f"{own}\n\n{licence}\n\n{people}")
    monkeypatch.setattr(make_text_domains, "COPYRIGHTS", tmp_path)
    first, second = make_text_domains.law()
    assert "without any warranty" in first
    assert "without any warranty" not in second
    assert "Package b" in second
    assert "@" not in first + second


@pytest.fixture
def home(tmp_path):
    """What the tool writes, in a few words that the small tokenizer has."""
    words = "name the colour : red green blue yes no true false say pick what is one two three"
    for domain in ("glosses", "law", "code", "short"):
        for split, n in (("train", 200), ("test", 80)):
            make_text_domains.write(
                tmp_path / "text" / domain / f"{split}.jsonl", [f"{words} {i % 40}" for i in range(n)]
            )
    make_text_domains.write(tmp_path / "text" / "study.jsonl", [f"{words} {i % 40} {i // 40}" for i in range(70)])
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def dry(experiment, home, *own, callbacks=()):
    """Run an experiment on a tiny Llama."""
    paths = [f"data_root={home}", f"model.net={home / 'model'}", f"folder={home / 'run'}"]
    quiet = ["logger=none", "trainer.enable_progress_bar=false", "scenario.end_token=null"]
    config = composed(f"experiment={experiment}", *paths, *quiet, *own)
    trainer, module, data = build(config, home / "run")
    assert all(part.requires_grad for part in module.parameters())
    trainer.callbacks += callbacks
    trainer.fit(module, datamodule=data)
    return data, json.loads((home / "run" / "metrics.json").read_text())


def test_home_pretraining_runs_dry_with_a_rate_that_is_warmed_up_again(home):
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    _, found = dry("home_pretraining", home, "data.steps=13", callbacks=[Rates()])
    assert found["stream"]["experiences"] == ["glosses", "law", "code"]
    assert found["score"] == "inverse_perplexity"
    # up in 4 steps, one at the rate, down to a tenth over 8, and up again from there in 4
    first, second = (np.array(rates[k : k + 13]) / 5e-5 for k in (0, 13))
    np.testing.assert_allclose(first[:5], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(second[:5], [0.1, 0.325, 0.55, 0.775, 1])
    np.testing.assert_allclose(np.diff(first[5:]), -0.9 / 8)


def test_home_retention_runs_dry(home):
    _, found = dry("home_retention", home, "data.steps=[12,6]")
    assert found["complete"]
    table = Retention.read(home / "run" / "retention.csv")
    assert table.about["since"].tolist() == [0, 0, 0, 0, *range(1, 7)]
    assert table.about["step"].tolist() == [0, 4, 8, *range(12, 19)]
    assert table.about["experience"].tolist() == [0] * 4 + [1] * 6


@pytest.mark.parametrize("share", [0, 0.5])
def test_the_dose_of_junk_is_at_equal_tokens_and_healed_by_clean_text(share, home):
    data, found = dry("junk_dose", home, "data.steps=[6,4]", f"scenario.mix.share={share}")
    dosed, healed = data.stream
    assert len(dosed.train) == len(healed.train)
    if share:
        assert dosed.train.from_other.mean() == pytest.approx(share, abs=0.5 / len(dosed.train))
    assert dosed.test.store.key == healed.test.store.key
    assert found["stream"]["steps"] == [6, 10]


def test_the_tool_writes_what_the_experiments_read(tmp_path, monkeypatch):
    packages = [(f"package{i}", "misc", f"does {i} things") for i in range(300)]
    monkeypatch.setattr(make_text_domains, "debian_packages", lambda: packages)
    sentences = [f"the study says that number {i} is {'very ' * 8}large" for i in range(300)]
    monkeypatch.setattr(make_text_domains, "wordnet_senses", lambda pos: [(["large"], "of size", sentences)])
    sizes = ["--train", "20000", "--test", "5000", "--domains", "code"]
    monkeypatch.setattr(sys, "argv", ["make_text_domains.py", str(tmp_path), *sizes])
    make_text_domains.main()
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))
    assert files == ["code/test.jsonl", "code/train.jsonl", "short/train.jsonl", "study.jsonl"]
    read = {name: [text for text, _ in TextFiles([tmp_path / name])] for name in files}
    assert len(read["study.jsonl"]) == make_text_domains.STUDY
    assert set(read["study.jsonl"]) <= set(sentences)
    assert "package1: does 1 things" in read["short/train.jsonl"]
    assert all("import" in "".join(read[name]) for name in files[:2])
