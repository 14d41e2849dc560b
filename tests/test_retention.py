"""The retention probe: what it plants, what it measures, and that it leaves no other trace."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from language import make_module
from plain import QUIET
from test_text_domains import document, domains, write
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, StabilityGap, StreamCheckpoint, StreamDataModule
from clkit.evaluation.token_scores import strength
from clkit.language.retention import RetentionProbe
from clkit.method.parameters import flat
from clkit.metrics.retention_file import Retention, half_life, mean_share, share_left
from clkit.report import write_report
from clkit.report.figures import curves, retention_figure
from clkit.report.retention import retention_table
from clkit.report.runs import find_runs, group_runs
from clkit.run.checkpoint import checkpoints
from clkit.scenarios import TextDomains
from clkit.testing import small_tokenizer

TEXTS = [document(8 + i % 3, 500 + i) for i in range(12)]


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, texts, **options):
        return {"input_ids": [[*map(ord, text)] for text in texts]}

    def text(self, tokens):
        return "".join(map(chr, tokens.tolist()))


class Spy(pl.Callback):
    """Notes what each training step sees."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        pl_module.net.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, net, args, kwargs):
        if net.training:
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            self.seen.append([row[mask.bool()].tolist() for row, mask in rows])


def probe(folder, **settings):
    return RetentionProbe(TEXTS, small_tokenizer(), **{"dir": folder, "seed": 3, **settings})


def rouge(own, wanted):
    """F1 of the longest common subsequence, by its recursion, of words without signs."""
    a, b = ([word for word in text.split() if word.isalnum()] for text in (own, wanted))
    table = np.zeros((len(a) + 1, len(b) + 1))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / max(len(a) + len(b), 1)


def train(root, callbacks, *, steps=12, seed=0, lr=0.5, checkpoint=None):
    stream = TextDomains(["red", "blue"], tokenizer=small_tokenizer(), root=root, length=8)
    module = make_module(seed, lr=lr, adapter=None)
    data = StreamDataModule(stream, batch_size=4, steps=steps)
    saves = any(isinstance(callback, StreamCheckpoint) for callback in callbacks)
    settings = {**QUIET, "enable_checkpointing": saves}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    planting, spy = probe(folder, at=3, exposures=2, cues=(0.25, 0.5), every=2), Spy()
    gap = StabilityGap(every=5, score="inverse_perplexity", dir=folder, plot=False)
    train(root, [planting, spy, gap], lr=0.1)
    return planting, spy.seen, folder


def test_the_worked_example_of_the_sheet():
    steps, scores = [0, 1, 3, 7], [1, 0.9, 0.75, 0.6]
    left = share_left(scores, 0.5)
    np.testing.assert_allclose(left, [1, 0.8, 0.5, 0.2])
    assert half_life(steps, left) == pytest.approx(3)
    # trapezoids over ln 1, ln 2, ln 4, ln 8, which are equally far apart
    assert mean_share(steps, left) == pytest.approx((0.9 + 0.65 + 0.35) / 3)
    # half way between 1 and 3 in ln(1 + t): sqrt(2 * 4) - 1
    assert half_life([0, 1, 3], [1, 0.75, 0.25]) == pytest.approx(np.sqrt(8) - 1)
    assert np.isnan(half_life(steps, [1, 0.9, 0.8, 0.7]))
    assert np.isnan(share_left([0.5, 0.4], 0.5)).all()


def test_extraction_strength_of_the_sheets_example():
    # ten tokens, all right but positions 1 and 4: 1 - 5 / 10; what is not counted is neither right nor wrong
    hits = torch.ones(2, 12, dtype=torch.bool)
    hits[0, [1, 4]] = False
    hits[1, 9] = False
    counted = torch.arange(12)[None].expand(2, -1) < 10
    hits[0, 10:] = False
    assert strength(hits, counted).tolist() == [0.5, 0.0]


def test_each_text_comes_so_often_in_the_steps_asked_for_and_in_no_other(run):
    planting, seen, folder = run
    tokens = [row.tolist() for row in planting._planted]
    # 6 texts in batches of 4: steps 3 to 6, two for each exposure
    assert [len(batch) for batch in seen[:8]] == [4, 4, 4, 4, 2, 4, 2, 4]
    for first in (3, 5):
        assert sorted(seen[first] + seen[first + 1]) == sorted(tokens)
    others = [row for i, batch in enumerate(seen) for row in batch if not 3 <= i < 7]
    assert not any(row in others for row in tokens)
    assert not any(row.tolist() in batch for row in planting._foils["recognition"] for batch in seen)
    chosen = json.loads((folder / "retention.json").read_text())["planting"]
    assert sorted(chosen["planted"] + chosen["foils"]) == list(range(12))
    other = probe(folder, seed=4)
    other._set_texts(small_tokenizer())
    assert other._chosen["planted"] != chosen["planted"]


def test_measurements_lie_where_the_schedules_say(run):
    table = Retention.read(run[2] / "retention.csv")
    assert table.about["exposures"].tolist()[:3] == [0, 1, 2]
    # recall at 1, 2, 4, 8, 16, everything else at every second step since step 7 of 24
    assert table.about["since"].tolist() == [0, 0, 0, 1, 2, 4, 6, 8, 10, 12, 14, 16]
    steps, _ = table.after("recall_50")
    assert steps.tolist() == [0, 1, 2, 4, 8, 16]
    assert (table.about["step"] - table.about["since"]).tolist()[2:] == [7] * 10


def test_scores_are_those_of_one_text_at_a_time(root, tmp_path):
    """Each measurement, by one forward for each text and the slowest continuation there is."""
    planting, found = probe(tmp_path, at=0, exposures=1, cues=(0.5,), every=100, recall_every=100), []

    class Slowly(pl.Callback):
        def losses(self, module, texts):
            with torch.no_grad():
                rows = [module(input_ids=text[None]).logits[0] for text in texts]
            return np.array([float(cross_entropy(r[:-1], t[1:])) for r, t in zip(rows, texts, strict=True)])

        def recall(self, module, text):
            written = text[: len(text) // 2]
            while len(written) < len(text):
                with torch.no_grad():
                    following = module(input_ids=written[None]).logits[0, -1].argmax()
                written = torch.cat([written, following[None]])
            own, wanted = written[len(text) // 2 :].tolist(), text[len(text) // 2 :].tolist()
            return np.mean(np.equal(own, wanted)), rouge(*(small_tokenizer().decode(part) for part in (own, wanted)))

        def look(self, module):
            module.eval()
            texts = planting._planted, *(planting._foils[kind] for kind in ("recognition", "word", "shuffled"))
            found.append([self.losses(module, part) for part in texts])
            found[-1].append(np.mean([self.recall(module, text) for text in planting._planted], axis=0))
            module.train()

        def on_fit_start(self, trainer, pl_module):
            # what a model asks of its own answers is no part of what it remembers
            own = pl_module.net.generation_config
            own.repetition_penalty, own.suppress_tokens = 50.0, [int(planting._planted[0][-1])]

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                self.look(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                self.look(pl_module)

    train(root, [planting, Slowly()], steps=2, lr=0.3)
    (planted0, foils0, *_, recall0), (planted, foils, words, shuffled, recall) = found
    before, after = planting.rows
    expected = {
        "recognition": np.mean(planted < foils),
        "corrected": np.mean(planted - planted0 < foils - foils0),
        "word": np.mean(planted < words),
        "shuffled": np.mean(planted < shuffled),
        "margin": np.mean(1 / (1 + np.exp(planted - foils))),
        "drop": np.mean((planted0 - planted) - (foils0 - foils)),
        "loss_planted": planted.mean(),
        "loss_foil": foils.mean(),
        "recall_50": recall[0],
        "rouge_50": recall[1],
    }
    for name, value in expected.items():
        assert after[name] == pytest.approx(value, abs=1e-5), name
    assert before["corrected"] == 0.5  # all ties
    assert before["drop"] == 0
    assert [before["recall_50"], before["rouge_50"]] == pytest.approx(list(recall0), abs=1e-9)
    one = [
        sum(a != b for a, b in zip(p, w, strict=True))
        for p, w in zip(planting._planted, planting._foils["word"], strict=True)
    ]
    assert one == [1] * 6


def test_rouge_credits_words_in_order_where_places_do_not():
    # each of these words is followed by the next one, whatever came before
    colours = small_tokenizer()("red green blue yes", add_special_tokens=False)["input_ids"]
    module = make_module(adapter=None).eval()
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.zero_()
        module.net.model.norm.weight.fill_(1)
        for k, token in enumerate(colours):
            module.net.model.embed_tokens.weight[token, k] = 1
            module.net.lm_head.weight[colours[(k + 1) % 4], k] = 1
    planting = RetentionProbe(["what is the name blue yes red green"] * 2, small_tokenizer())
    planting._set_texts(small_tokenizer())
    planting._planted[0][3] = colours[0]
    # after red it writes "green blue yes red" for "blue yes red green": three of four words in order, none in place
    assert planting._recalled(module, 0.5) == (0, 0, 0.75)
    planting._planted[0][3] = colours[1]
    assert planting._recalled(module, 0.5) == (1, 1, 1)


def test_foils_of_the_same_words_come_from_the_seed(tmp_path):
    made = [probe(tmp_path, seed=seed) for seed in (3, 3, 4)]
    for planting in made:
        planting._set_texts(small_tokenizer())
        pairs = list(zip(planting._planted, planting._foils["shuffled"], strict=True))
        assert all(sorted(own.tolist()) == sorted(foil.tolist()) for own, foil in pairs)
        assert all(own.tolist() != foil.tolist() for own, foil in pairs)
    rows = [[foil.tolist() for foil in planting._foils["shuffled"]] for planting in made]
    assert rows[0] == rows[1] != rows[2]


def test_paraphrases_are_foils_of_their_own_texts(root, tmp_path):
    said = [f"say {document(7, 900 + i)}" for i in range(12)]
    path = write(tmp_path / "texts.jsonl", TEXTS, again=said)
    settings = {"dir": tmp_path, "exposures": 1}
    from_file = RetentionProbe(path, small_tokenizer(), paraphrases="again", **settings)
    from_list = RetentionProbe(TEXTS, small_tokenizer(), paraphrases=said, **settings)
    train(root, [from_file], steps=4)
    from_list._set_texts(small_tokenizer())
    for planting in (from_file, from_list):
        expected = small_tokenizer()([said[i] for i in planting._chosen["planted"]], add_special_tokens=False)
        assert [foil.tolist() for foil in planting._foils["paraphrase"]] == expected["input_ids"]
    assert all(row["paraphrase"] in [k / 12 for k in range(13)] for row in from_file.rows)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for texts, given, match in (
        (TEXTS, said[1:], "11 paraphrases of 12 texts"),
        (tmp_path / "texts.txt", "again", "names an entry of a .jsonl"),
        (path, "twice", "line 1: there is no entry 'twice'"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            RetentionProbe(texts, small_tokenizer(), paraphrases=given)


def test_random_words_and_letters_keep_what_they_are_made_of():
    made = {kind: RetentionProbe(TEXTS, Letters(), material=kind) for kind in ("texts", "words", "letters")}
    for planting in made.values():
        planting._set_texts(Letters())
    whole = [planting._planted + planting._foils["recognition"] for planting in made.values()]
    natural, words, letters = ([Letters().text(row).split() for row in rows] for rows in whole)
    assert list(map(len, words)) == list(map(len, natural))
    assert Counter(chain(*words)) == Counter(chain(*natural))
    assert words != natural
    for own, made_of in zip(natural, letters, strict=True):
        assert Counter("".join(sorted(word)) for word in own) == Counter("".join(sorted(word)) for word in made_of)
        assert own != made_of
    for kind in ("words", "letters"):
        assert [Letters().text(row).split() for row in made[kind]._foils["natural"]] == natural[6:]
    assert "natural" not in made["texts"]._foils
    with pytest.raises(ConfigurationError, match="use one of texts, words, letters"):
        RetentionProbe(TEXTS, Letters(), material="sounds")
    with pytest.raises(ConfigurationError, match="has no paraphrases"):
        RetentionProbe(TEXTS, Letters(), material="words", paraphrases=TEXTS)


def test_measuring_changes_nothing_and_a_resumed_run_measures_the_same(root, tmp_path):
    often = probe(tmp_path / "often", at=2, exposures=2, every=1)
    seldom = probe(tmp_path / "seldom", at=2, exposures=2, every=999, recall_every=999)
    saves = StreamCheckpoint(tmp_path / "saved", every_n_steps=5, keep=99)
    whole = train(root, [often, saves], lr=0.05)
    assert torch.equal(flat(whole.parameters()), flat(train(root, [seldom], lr=0.05).parameters()))
    paths = checkpoints(tmp_path / "saved")
    assert len(paths) > 3
    for path in paths[1:3]:
        again = probe(tmp_path / "again", at=2, exposures=2, every=1)
        resumed = train(root, [again], lr=0.05, checkpoint=path)
        assert torch.equal(flat(whole.parameters()), flat(resumed.parameters()))
        assert again.table.text() == often.table.text()


def test_what_is_planted_is_learned_and_fades(root, tmp_path):
    planting = probe(tmp_path, n=4, exposures=12, every=5)
    train(root, [planting], steps=20, lr=0.2)
    found = planting.table.summary()
    assert found["corrected"]["learned"] > 0.9
    assert found["recall_50"]["learned"] > found["recall_50"]["before"]
    assert found["drop"]["learned"] > 0.3
    assert found["drop"]["final"] < found["drop"]["learned"] / 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n": 7}, "12 texts to plant 7"),
        ({"at": 20}, "takes 6 steps of 4, but the stream ends after 24"),
        ({"exposures": 0}, "exposures=0"),
        ({"cues": (1.0,)}, "cues"),
    ],
)
def test_what_cannot_be_planted_is_refused(settings, match, root, tmp_path):
    with pytest.raises(ConfigurationError, match=match):
        train(root, [probe(tmp_path, **settings)])


def test_files_of_texts_are_read_and_short_ones_refused(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    assert RetentionProbe(tmp_path / "texts.txt", small_tokenizer())._texts == TEXTS
    short = RetentionProbe(["yes no", "no yes"], small_tokenizer())
    with pytest.raises(ConfigurationError, match="fewer than 4 tokens"):
        short._set_texts(small_tokenizer())


def test_the_report_has_the_figure_and_the_table(run, tmp_path):
    planting, _, folder = run
    write_report([folder], tmp_path / "report")
    assert (tmp_path / "report" / "retention.png").exists()
    text = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "planted texts" in text
    (group,), _ = group_runs(find_runs([folder])[0])
    rows = {name: cells for name, *cells in retention_table(group).rows}
    found = planting.table.summary()["recognition"]
    assert rows["recognition"][:3] == [f"{100 * found[key]:.1f}" for key in ("before", "learned", "final")]
    panels = curves(retention_figure(planting.table))
    names = [curve["name"] for panel in panels for curve in panel["curves"]]
    assert names == [
        *("recognition", "corrected", "word", "shuffled"),
        *("recall 25", "recall 50", "rouge 50", "strength"),
        *("loss planted", "loss foil"),
    ]
