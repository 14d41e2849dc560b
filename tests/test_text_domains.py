"""Raw text: its store, its chunks, the stream made of them, and the score that they are evaluated by."""

from __future__ import annotations

import csv
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest
import pytorch_lightning as pl
import torch
from datasets import Dataset as Table
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from language import make_config, make_module
from plain import QUIET
from pyarrow import parquet
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.data.loader import read_samples
from clkit.evaluation.token_scores import answer_loss
from clkit.language.chunks import Mixture, PadPacked, TextChunks, keep_documents_apart
from clkit.language.dataset import Pad
from clkit.language.models import CausalLM
from clkit.language.text_store import TextFiles, TextStore, TextTable, store_of
from clkit.metrics.history import History
from clkit.metrics.summary import summary
from clkit.report import write_report
from clkit.report.figures import curves, perplexity_figure
from clkit.report.perplexity import domains_table
from clkit.scenarios import TextDomains
from clkit.strategies import ExperienceReplay, ReplayShare
from clkit.testing import small_tokenizer

WORDS = [
    "what",
    "is",
    "plus",
    "minus",
    "the",
    "sum",
    "of",
    "name",
    "colour",
    "yes",
    "no",
    "true",
    "false",
    "red",
    "green",
    "blue",
    "pick",
    "say",
]
END = 2  # </s> of the small tokenizer


def document(n: int, seed: int) -> str:
    """A text of ``n`` words."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def write(path, texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": text, **{k: v[i] for k, v in more.items()}}) + "\n" for i, text in enumerate(texts))
    )
    return path


def stored(tmp_path, lengths, **options) -> TextStore:
    """A store of documents with so many tokens, their end tokens among them."""
    path = write(tmp_path / "texts" / "some.jsonl", [document(n - 1, i) for i, n in enumerate(lengths)])
    return store_of(TextFiles([path], **options), small_tokenizer(), tmp_path / "cache")


def domains(root, names=("red", "green", "blue"), n: int = 12):
    """A folder of domains: each repeats its own name among other words."""
    for k, name in enumerate(names):
        write(root / name / "train.jsonl", [f"{name} {document(3 + i % 5, 100 * k + i)} {name}" for i in range(n)])
        write(root / name / "test.jsonl", [f"{name} {document(6, 9000 + 100 * k + i)} {name}" for i in range(6)])
    return root


# The store


def test_all_forms_of_files_give_the_same_tokens(tmp_path):
    texts = [document(n, n) for n in (4, 2, 7)]
    write(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    parquet.write_table(pyarrow.table({"body": texts, "rest": [1, 2, 3]}), tmp_path / "a.parquet")
    tokenizer = small_tokenizer()
    sources = {
        "jsonl": TextFiles([tmp_path / "a.jsonl"]),
        "txt": TextFiles([tmp_path / "a.txt"], separator="\n\n"),
        "parquet": TextFiles([tmp_path / "a.parquet"], column="body"),
        "table": TextTable(Table.from_dict({"text": texts})),
    }
    expected = [number for text in texts for number in [*tokenizer.convert_tokens_to_ids(text.split()), END]]
    for kind, source in sources.items():
        store = store_of(source, tokenizer, tmp_path / kind)
        assert store.tokens.tolist() == expected, kind
        assert store.lengths.tolist() == [5, 3, 8]
        assert store.n_bytes == sum(len(text) for text in texts)
        assert store.document(1).tolist() == expected[5:8]
    assert store_of(TextFiles([tmp_path / "a.txt"]), tokenizer, tmp_path / "one").n_documents == 1


def test_a_text_is_encoded_once_however_many_runs_want_it(tmp_path):
    class Counted(TextFiles):
        read = 0

        def __iter__(self):
            Counted.read += 1
            yield from super().__iter__()

    source, tokenizer = Counted([write(tmp_path / "a.jsonl", [document(5, i) for i in range(50)])]), small_tokenizer()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store_of(source, tokenizer, tmp_path / "cache"), range(4)))
    assert Counted.read == 1
    assert {store.folder for store in found} == {found[0].folder}
    moved = write(tmp_path / "elsewhere" / "b.jsonl", [document(5, i) for i in range(50)])
    tokenizer(["name the"], truncation=True, max_length=1)  # leaves a setting in the tokenizer
    assert store_of(TextFiles([moved]), tokenizer, tmp_path / "cache").folder == found[0].folder
    assert pickle.loads(pickle.dumps(found[0])).tokens.tolist() == found[0].tokens.tolist()
    assert len(pickle.dumps(found[0])) < 1000


def test_other_contents_tokenizers_and_ends_have_other_stores(tmp_path):
    path, tokenizer, other = write(tmp_path / "a.jsonl", ["yes no"]), small_tokenizer(), small_tokenizer()
    other.add_tokens(["indeed"])
    cache = tmp_path / "cache"
    folders = [
        store_of(TextFiles([path]), tokenizer, cache).folder,
        store_of(TextFiles([path]), other, cache).folder,
        store_of(TextFiles([path]), tokenizer, cache, end_token="<s>").folder,
    ]
    write(path, ["yes yes"])
    folders.append(store_of(TextFiles([path]), tokenizer, cache).folder)
    assert len(set(folders)) == 4
    assert store_of(TextFiles([path]), tokenizer, cache, end_token="<s>").tokens.tolist()[-1] == 1


def test_a_run_that_was_stopped_while_encoding_leaves_nothing_that_another_takes(tmp_path):
    class Broken(TextFiles):
        def __iter__(self):
            yield "yes", math.nan
            raise KeyboardInterrupt

    path, cache = write(tmp_path / "a.jsonl", ["yes", "no"]), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        store_of(Broken([path]), small_tokenizer(), cache)
    assert not [entry for entry in cache.iterdir() if entry.suffix != ".lock"]
    store = store_of(TextFiles([path]), small_tokenizer(), cache)
    # a killed process cannot clear up after itself
    part = store.folder.with_name(store.folder.name + ".part")
    store.folder.rename(part)
    (part / "ends.bin").unlink()
    assert store_of(TextFiles([path]), small_tokenizer(), cache).tokens.tolist() == store.tokens.tolist()
    (store.folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="tokens.bin has another size"):
        store_of(TextFiles([path]), small_tokenizer(), cache)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"text": "yes"}\n{"text": 3}\n', "line 2: 'text' is 3, which is no text"),
        ('{"txt": "yes"}\n', "line 1: there is no entry 'text'"),
        ('{"text": "yes"\n', "line 1: Expecting"),
        ('{"text": " "}\n', "no document with a text"),
    ],
)
def test_bad_files_are_named_with_their_line(content, match, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigurationError, match=match):
        store_of(TextFiles([tmp_path / "a.jsonl"]), small_tokenizer(), tmp_path / "cache")


def test_what_cannot_be_a_source_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        store_of(TextFiles([tmp_path / "a.txt"]), small_tokenizer(), tmp_path / "cache")
    parquet.write_table(pyarrow.table({"body": ["yes"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match=r"a.parquet: .*text"):
        store_of(TextFiles([tmp_path / "a.parquet"]), small_tokenizer(), tmp_path / "cache")
    (tmp_path / "b.parquet").write_bytes(b"none")
    with pytest.raises(ConfigurationError, match="b.parquet"):
        store_of(TextFiles([tmp_path / "b.parquet"]), small_tokenizer(), tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="its columns are text"):
        TextTable(Table.from_dict({"text": ["yes"]}), column="body")
    with pytest.raises(ConfigurationError, match="no token '<none>'"):
        store_of(TextFiles([write(tmp_path / "a.jsonl", ["yes"])]), small_tokenizer(), tmp_path, end_token="<none>")


# Chunks


def test_chunks_of_the_sheets_example(tmp_path):
    # documents of 5, 3, 9, 2 tokens and their end tokens, S = 8: 23 tokens, 2 chunks, 7 dropped
    store = stored(tmp_path, [6, 4, 10, 3])
    chunks = TextChunks(store, length=8)
    assert (chunks.n_tokens, len(chunks), chunks.n_left_out) == (23, 2, 7)
    together = store.tokens.tolist()
    for i in range(2):
        assert chunks[i]["input_ids"].tolist() == chunks[i]["labels"].tolist() == together[8 * i : 8 * i + 8]
    assert [chunks.documents_of(i).tolist() for i in range(2)] == [[0, 1], [1, 2]]
    assert chunks[-1]["input_ids"].tolist() == together[8:16]


def test_chunks_are_the_documents_in_the_order_drawn_whatever_their_lengths(tmp_path):
    rng = np.random.default_rng(0)
    store = stored(tmp_path, rng.integers(2, 40, 60).tolist())
    chosen = rng.choice(60, 31, replace=False)
    chunks = TextChunks(store, chosen, length=7, seed=(3,))
    assert sorted(chunks.documents) == sorted(chosen)
    assert chunks.documents.tolist() != chosen.tolist()
    together = np.concatenate([store.document(int(i)) for i in chunks.documents])
    read = torch.cat([chunks[i]["input_ids"] for i in range(len(chunks))])
    assert read.tolist() == together[: len(read)].tolist()
    assert len(together) - len(read) == chunks.n_left_out < 7
    owners = np.repeat(chunks.documents, store.lengths[chunks.documents])
    for i in range(len(chunks)):
        assert chunks.documents_of(i).tolist() == list(dict.fromkeys(owners[7 * i : 7 * i + 7].tolist()))
    assert len(TextChunks(store, chosen, length=7, limit=100)) == 14
    with pytest.raises(ConfigurationError, match="fewer than one chunk of 64"):
        TextChunks(store, np.array([0]), length=64)


def test_with_boundaries_positions_begin_anew_and_first_tokens_have_no_label(tmp_path):
    chunks = TextChunks(stored(tmp_path, [6, 4, 10, 3]), length=8, boundaries=True)
    first, second = chunks[0], chunks[1]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert first["document_ids"].tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert second["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert (first["labels"] == -100).nonzero()[:, 0].tolist() == [0, 6]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapted", [False, True])
def test_documents_of_a_chunk_are_as_if_they_were_alone(attention, adapted, tmp_path):
    torch.manual_seed(0)
    config = make_config()
    module = (
        CausalLM(config, attn_implementation=attention) if not adapted else make_module(attn_implementation=attention)
    )
    chunks = TextChunks(stored(tmp_path, [6, 4, 10, 3, 7, 9]), length=16, boundaries=True)
    pad = PadPacked()
    for _ in range(2):
        pad.prepare(module)
    batch = pad([chunks[0], chunks[1]])
    module.eval()
    with torch.no_grad():
        together = module(**batch).logits
        losses = []
        for row in range(2):
            for number in batch["document_ids"][row].unique():
                own = batch["document_ids"][row] == number
                tokens = batch["input_ids"][row][own]
                alone = module(input_ids=tokens[None]).logits[0]
                torch.testing.assert_close(together[row][own], alone, atol=1e-5, rtol=1e-5)
                losses.append(cross_entropy(alone[:-1], tokens[1:], reduction="none"))
        assert float(module.loss(batch)) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
        crossed = module(**{k: v for k, v in batch.items() if k != "document_ids"}).logits
    assert not torch.allclose(crossed, together, atol=1e-3)


def test_attention_that_takes_no_mask_is_refused():
    model = make_module(adapter=None).net
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigurationError, match="attn_implementation=sdpa"):
        keep_documents_apart(model)


def test_a_mixture_has_the_share_and_as_many_chunks_as_before(tmp_path):
    store = stored(tmp_path, [9] * 80)
    new, other = TextChunks(store, np.arange(60), length=9), TextChunks(store, np.arange(60, 80), length=9)
    mixture = Mixture(new, other, 0.4, seed=(1,))
    assert (len(mixture), int(mixture.from_other.sum())) == (60, 24)
    drawn = [mixture[i]["input_ids"].tolist() for i in range(60)]
    own = [new[i]["input_ids"].tolist() for i in range(60)]
    others = [other[i]["input_ids"].tolist() for i in range(20)]
    assert all((row == own[i]) != mixture.from_other[i] for i, row in enumerate(drawn))
    counts = [drawn.count(row) for row in others]
    assert sorted(set(counts)) == [1, 2]  # 24 places for 20 chunks: each comes before one comes again
    assert [Mixture(new, other, share).from_other.mean() for share in (0.0, 1.0)] == [0, 1]
    with pytest.raises(ConfigurationError, match=r"share=1.5"):
        Mixture(new, other, 1.5)


# The stream


def test_each_domain_is_an_experience(tmp_path):
    root = domains(tmp_path)
    stream = TextDomains(tokenizer=small_tokenizer(), root=root, length=8)
    assert [experience.name for experience in stream] == ["blue", "green", "red"]
    assert stream.kind == "domain-incremental"
    assert stream.model_arguments == {}
    batch = read_samples(stream[0].train, torch.arange(3), collate_fn=stream.collate_fn)
    assert {key: tuple(part.shape) for key, part in batch.items()} == dict.fromkeys(
        ("attention_mask", "input_ids", "labels"), (3, 8)
    )
    assert TextDomains(["red"], tokenizer=small_tokenizer(), root=root, length=8)[0].name == "red"
    same = TextDomains(tokenizer=small_tokenizer(), root=root, length=8)
    assert same.fingerprints() == stream.fingerprints()
    for other in ({"length": 7}, {"seed": 1}, {"boundaries": True}, {"mix": {"source": "red", "share": 0.2}}):
        changed = TextDomains(tokenizer=small_tokenizer(), root=root, **{"length": 8, **other})
        assert all(a != b for a, b in zip(changed.fingerprints(), stream.fingerprints(), strict=True)), other


def test_documents_are_held_out_whole_where_there_are_no_test_files(tmp_path):
    write(tmp_path / "one.jsonl", [document(7, i) for i in range(40)])
    stream = TextDomains(tokenizer=small_tokenizer(), root=tmp_path, length=8, held_out=0.25)
    train, test = stream[0].train, stream[0].test
    assert (len(train.documents), len(test.documents)) == (30, 10)
    assert not set(train.documents) & set(test.documents)
    assert stream[0].name == "one"
    other = TextDomains(tokenizer=small_tokenizer(), root=tmp_path, length=8, held_out=0.25, seed=1)
    assert set(other[0].test.documents) != set(test.documents)
    write(tmp_path / "one.jsonl", [document(70, 0)])
    with pytest.raises(ConfigurationError, match="nothing of it can be held out"):
        TextDomains(tokenizer=small_tokenizer(), root=tmp_path, length=8)


def test_a_limit_keeps_the_best_documents(tmp_path):
    quality = np.random.default_rng(0).permutation(30).astype(float).tolist()
    write(tmp_path / "a" / "train.jsonl", [document(9, i) for i in range(30)], clarity=quality)
    write(tmp_path / "a" / "test.jsonl", [document(9, 99)] * 2, clarity=[0, 0])
    settings = {"tokenizer": small_tokenizer(), "root": tmp_path, "length": 10, "quality": "clarity"}
    best = TextDomains(**settings, limit={"train": 100}, choose="best")[0].train
    assert len(best) == 10
    assert sorted(quality[i] for i in best.documents) == list(range(20, 30))
    assert len(TextDomains(**settings, limit=50)[0].train) == 5
    with pytest.raises(ConfigurationError, match="no quality"):
        TextDomains(**{**settings, "quality": None}, choose="best")
    with pytest.raises(ConfigurationError, match="limit of train=5"):
        TextDomains(**settings, limit={"train": 5})


def test_a_source_may_be_a_mapping_or_a_folder_of_files(tmp_path):
    for part in "ab":
        write(tmp_path / "many" / "train" / f"{part}.jsonl", [document(9, ord(part))] * 3)
    (tmp_path / "many" / "test.txt").write_text(document(20, 7))
    write(tmp_path / "files" / "x.jsonl", [document(9, 3)] * 4)
    parquet.write_table(pyarrow.table({"body": [document(9, 5)] * 4}), tmp_path / "t.parquet")
    given = {
        "folders": "many",
        "files": {"train": ["files/x.jsonl"], "test": "many/test.txt"},
        "table": {"train": "t.parquet", "column": "body"},
        "hub": {"hub": "json", "options": {"data_files": str(tmp_path / "files" / "x.jsonl")}},
    }
    stream = TextDomains(given, tokenizer=small_tokenizer(), root=tmp_path, length=8)
    assert [len(stream.stores[name]) for name in given] == [6, 4, 4, 4]
    assert [experience.train.n_tokens for experience in stream] == [60, 40, 30, 30]
    for wrong, match in (
        ({"a": "none"}, "There is no .*none; .* has files, many, t.parquet"),
        ({"a": {"test": "t.parquet"}}, "has no train"),
        ({"a": {"train": "t.parquet", "colum": "body"}}, "did you mean column"),
        ({"a": {"hub": "json", "options": {"data_files": "none.json"}}}, "datasets cannot load split 'train'"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            TextDomains(wrong, tokenizer=small_tokenizer(), root=tmp_path, length=8)
    with pytest.raises(ConfigurationError, match=r"mix has no share"):
        TextDomains(given, tokenizer=small_tokenizer(), root=tmp_path, length=8, mix={"source": "many"})
    mix = {"source": "many", "share": 0.1, "domains": ["x"]}
    with pytest.raises(ConfigurationError, match=r"mix names 'x'"):
        TextDomains(given, tokenizer=small_tokenizer(), root=tmp_path, length=8, mix=mix)


def test_a_dose_of_another_text_comes_into_the_domains_that_are_named(tmp_path):
    root = domains(tmp_path / "a")
    write(tmp_path / "junk.jsonl", ["true false"] * 40)
    mix = {"source": str(tmp_path / "junk.jsonl"), "share": 0.5, "domains": ["red"]}
    stream = TextDomains(["red", "blue"], tokenizer=small_tokenizer(), root=root, length=9, mix=mix)
    red, blue = stream[0].train, stream[1].train
    plain = TextDomains(["red", "blue"], tokenizer=small_tokenizer(), root=root, length=9)
    assert len(red) == len(plain[0].train)
    assert red.from_other.sum() == round(0.5 * len(red))
    assert isinstance(blue, TextChunks)
    true = small_tokenizer().convert_tokens_to_ids("true")
    assert [bool((red[i]["input_ids"] == true).sum() >= 3) for i in range(len(red))] == red.from_other.tolist()


def test_the_config_builds_the_stream_and_its_defaults(tmp_path):
    domains(tmp_path / "text")
    small_tokenizer().save_pretrained(tmp_path / "model")
    with initialize_config_module("clkit.conf", version_base="1.3"):
        overrides = ["scenario=text", "model=causal_lm", f"model.net={tmp_path / 'model'}", f"data_root={tmp_path}"]
        config = compose("train", [*overrides, "scenario.length=8", "folder=none"])
    assert config.evaluation.score == "inverse_perplexity"
    assert config.evaluation.keys() == compose_default().evaluation.keys()
    stream = instantiate(config.scenario)
    assert len(stream) == 3


def compose_default():
    with initialize_config_module("clkit.conf", version_base="1.3"):
        return compose("train")


# Training and evaluation


@pytest.mark.parametrize("boundaries", [False, True])
def test_loss_and_perplexity_of_every_domain_at_every_step(boundaries, tmp_path):
    stream = TextDomains(
        ["red", "blue"], tokenizer=small_tokenizer(), root=domains(tmp_path), length=8, boundaries=boundaries
    )
    torch.manual_seed(0)
    module = make_module(lr=0.1, adapter=None)
    gap = StabilityGap(every=1, subset=None, score="inverse_perplexity", batch_size=3, dir=tmp_path / "run")
    losses = []

    class Slowly(pl.Callback):
        """The mean loss of each domain by one forward for each chunk, after each step."""

        def on_train_batch_end(self, trainer, pl_module, *rest):
            pl_module.eval()
            row = []
            for experience in stream:
                chunks = [stream.collate_fn([experience.test[i]]) for i in range(len(experience.test))]
                with torch.no_grad():
                    row.append(float(torch.stack([pl_module(**chunk).loss for chunk in chunks]).mean()))
            pl_module.train()
            losses.append(row)

    data = StreamDataModule(stream, batch_size=4, steps=5)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[Slowly(), gap], **QUIET)
    trainer.fit(module, datamodule=data)
    found = gap.history.select("step")
    expected = np.array(losses)
    assert len(found) == 10
    for k in range(2):
        rows = ~np.isnan(found.scores[:, k])
        np.testing.assert_allclose(-np.log(found.scores[rows, k]), expected[rows, k], rtol=1e-5)
    ends = gap.history.select("end").scores
    np.testing.assert_allclose(ends[-1], found.scores[-1], rtol=1e-6)
    assert gap.metrics["score"] == "inverse_perplexity"
    assert pytest.approx(np.exp(-expected[-1]).mean(), rel=1e-5) == gap.metrics.ACC
    assert expected[4, 0] < expected[0, 0]


@pytest.mark.parametrize("boundaries", [False, True])
def test_replay_by_share_trains_on_as_many_tokens_as_before_and_a_memory_on_more(boundaries, tmp_path):
    root, seen = domains(tmp_path), {}
    for strategy in (ReplayShare(0.5), ExperienceReplay(8, weigh="tokens")):
        name = type(strategy).__name__
        stream = TextDomains(["red", "blue"], tokenizer=small_tokenizer(), root=root, length=8, boundaries=boundaries)
        module = make_module(lr=0.1, adapter=None)
        sizes = seen[name] = []

        def note(net, args, kwargs, sizes=sizes):
            sizes.append(kwargs["input_ids"].numel())

        module.net.register_forward_pre_hook(note, with_kwargs=True)
        data = StreamDataModule(stream, batch_size=4, steps=3)
        pl.Trainer(max_epochs=data.total_epochs, callbacks=[strategy], **QUIET).fit(module, datamodule=data)
        assert all(part.isfinite().all() for part in module.parameters())
    assert seen["ReplayShare"] == [32] * 6
    assert seen["ExperienceReplay"] == [32] + [64] * 5


def test_a_loss_that_is_not_finite_is_the_worst_score(tmp_path):
    stream = TextDomains(["red"], tokenizer=small_tokenizer(), root=domains(tmp_path), length=8)
    module = make_module(adapter=None)
    with torch.no_grad():
        module.net.lm_head.weight.fill_(torch.nan)
    batch = stream.collate_fn([stream[0].test[0]])
    assert answer_loss(module, batch).isnan().all()
    gap = StabilityGap(score="inverse_perplexity", dir=tmp_path / "run", plot=False)
    data = StreamDataModule(stream, batch_size=4, steps=2)
    with pytest.warns(UserWarning, match="NaN"):
        pl.Trainer(max_epochs=data.total_epochs, callbacks=[gap], **QUIET).fit(module, datamodule=data)
    assert set(gap.history.scores[:, 0]) == {0.0}


def test_padding_beside_packed_chunks_changes_nothing(tmp_path):
    store = stored(tmp_path, [6, 4, 10, 3, 7, 9])
    long, short = (TextChunks(store, length=n, boundaries=True)[0] for n in (16, 9))
    module = make_module(adapter=None).eval()
    pad = PadPacked()
    pad.prepare(module)
    with torch.no_grad():
        both, alone = module(**pad([long, short])).logits, module(**pad([short])).logits
    torch.testing.assert_close(both[1, :9], alone[0], atol=1e-5, rtol=1e-5)
    assert isinstance(pad, Pad)


# The report


def test_the_report_tells_loss_perplexity_and_bits_a_byte(tmp_path):
    boundaries = {"step": [(1, 0.20, None), (2, 0.25, None), (3, 0.10, 0.3), (4, 0.125, 0.5)]}
    lines = ["step,experience,phase,E0,E1", "0,0,init,0.05,0.2"]
    lines += [f"{s},{int(s > 2)},step,{a},{'' if b is None else b}" for s, a, b in boundaries["step"]]
    lines.insert(4, "2,0,end,0.25,")
    lines.insert(5, "2,0,before,,0.25")
    (tmp_path / "history.csv").write_text("\n".join([*lines, "4,1,end,0.125,0.5"]) + "\n")
    history = History.read(tmp_path / "history.csv")
    about = {"name": "text", "kind": "domain-incremental", "experiences": ["law", "code"]}
    about["bytes_per_token"] = {"law": 4.0, "code": 2.0}
    found = summary(history, stream=about, complete=True, score="inverse_perplexity", schedule="every step", subset=4)
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    report = write_report([tmp_path], tmp_path / "report")
    (group,) = report.groups
    law, code = domains_table(group).rows
    nats = [f"{-math.log(p):.3f}" for p in (0.05, 0.25, 0.10, 0.125)]
    assert law == ("law", *nats, "8.0", f"{math.log2(8) / 4:.3f}")
    assert code == ("code", f"{math.log(4):.3f}", f"{math.log(2):.3f}", "–", f"{math.log(2):.3f}", "2.0", "0.500")
    rows = list(csv.DictReader((tmp_path / "report" / "perplexity.csv").open()))
    assert [float(row["perplexity"]) for row in rows if row["domain"] == "law" and row["phase"] == "step"] == [
        pytest.approx(1 / p) for p in (0.20, 0.25, 0.10, 0.125)
    ]
    assert (tmp_path / "report" / "perplexity.png").exists()
    assert "bits a byte" in (tmp_path / "report" / "report.html").read_text("utf-8")
    (panel,) = curves(perplexity_figure(history, ["law", "code"]))
    shown = {curve["name"]: curve for curve in panel["curves"]}
    assert shown["law"]["x"] == [0, 1, 2, 3, 4]
    assert shown["law"]["y"] == [round(-math.log(p), 2) for p in (0.05, 0.20, 0.25, 0.10, 0.125)]
    assert shown["code"]["x"] == [3, 4]
