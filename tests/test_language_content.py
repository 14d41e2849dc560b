"""What is the answer and what is format: in labels, in scores of tokens, and where a prompt is cut."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clkit import ConfigurationError, Experience, StabilityGap, Stream, StreamDataModule
from clkit.evaluation.token_scores import token_accuracy
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.records import Record
from clkit.scenarios import Instructions

THINK = """{% for m in messages %}<|{{ m.role }}|>
{% if loop.last and m.role == 'assistant' %}<think>

</think>

{% endif %}{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
LLAMA = """{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>
{%- endif %}{% endfor %}"""
GEMMA = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TEMPLATES = {"think": THINK, "llama": LLAMA, "gemma": GEMMA, "plain": PLAIN}


def letters(template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """One token for each character but special ones, which tells what is where."""
    marks = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<unk>"]
    characters = [chr(n) for n in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.WordLevel({c: n for n, c in enumerate(characters)}, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>", pad_token="</s>")
    built.add_special_tokens({"additional_special_tokens": marks})
    built.chat_template = template
    return built


def text(tokenizer, tokens) -> str:
    return "".join(tokenizer.convert_ids_to_tokens([int(t) for t in tokens]))


def ask(prompt: str, answer: str) -> Record:
    return Record((("user", prompt),), answer)


WORDS = st.text(st.sampled_from("ab <>think/\n.1"), min_size=1, max_size=12).filter(lambda s: s.strip())


@settings(max_examples=60)
@given(st.sampled_from([*TEMPLATES, None]), st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_labels_are_the_answer_with_its_end_and_content_is_the_answer_alone(name, pairs):
    tokenizer = letters(TEMPLATES[name] if name else None)
    records = [ask(*pair) for pair in pairs]
    learned = InstructionDataset(records, tokenizer)
    scored = learned.for_scores()
    for i, record in enumerate(records):
        assert torch.equal(learned[i]["input_ids"], scored[i]["input_ids"])
        ids, labels = learned[i]["input_ids"], learned[i]["labels"]
        answer = text(tokenizer, ids[labels != -100])
        end = "<|end|>" if name in ("think", "gemma") else "</s>"
        between = {"llama": " ", "plain": "\n"}.get(name, "")
        wanted = record.answer.strip() if name == "gemma" else record.answer
        assert answer.removeprefix(" " if name == "llama" else "") == f"{wanted}{between}{end}"
        content = scored[i]["labels"]
        assert text(tokenizer, content[content != -100]) == wanted
        prompt = text(tokenizer, learned.prompt(i))
        if name == "think":
            assert prompt.endswith("<|assistant|>\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_of_which_a_template_leaves_nothing_is_encoded(name):
    data = InstructionDataset([ask("a", " ")], letters(TEMPLATES[name]))
    assert (data[0]["labels"] != -100).any()
    assert (data.for_scores()[0]["labels"] != -100).sum() < (data[0]["labels"] != -100).sum()


def test_what_a_template_writes_before_answers_is_said():
    with pytest.warns(UserWarning, match=r"writes '<think>.*' before an answer; .* neither learned nor scored"):
        InstructionDataset([ask("a", "b")], letters(THINK))


class Knows(pl.LightningModule):
    """Puts the tokens of a format on top everywhere, and an answer's only if it may."""

    def __init__(self, favourite: int, size: int):
        super().__init__()
        self.favourite, self.size = favourite, size
        self.net = self.Net(self)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.0)

    class Net(torch.nn.Module):
        def __init__(self, outer):
            super().__init__()
            self._outer = [outer]

        def generate(self):
            """What tells a language model."""

        def get_input_embeddings(self):
            """Likewise."""

        def forward(self, input_ids, attention_mask=None, **_):
            outer = self._outer[0]
            logits = torch.zeros(*input_ids.shape, outer.size)
            logits[..., outer.favourite] = 1
            return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_a_model_that_knows_the_format_alone_scores_nothing(name, tmp_path):
    tokenizer = letters(TEMPLATES[name] if name else None)
    for split in ("train", "test"):
        (tmp_path / "task").mkdir(exist_ok=True)
        rows = [{"prompt": "say a", "answer": "a"}, {"prompt": "say bb", "answer": "bb"}]
        (tmp_path / "task" / f"{split}.json").write_text(json.dumps(rows))
    stream = Instructions(tokenizer=tokenizer, root=tmp_path)
    batch = stream.collate_fn([stream[0].test[i] for i in range(2)])
    for token in ("</s>", "<|end|>", "\n", " "):
        module = Knows(tokenizer.convert_tokens_to_ids(token), len(tokenizer))
        assert token_accuracy(module, batch).tolist() == [0, 0]
    module = Knows(tokenizer.convert_tokens_to_ids("a"), len(tokenizer))
    assert token_accuracy(module, batch).tolist() == [1, 0]


@settings(max_examples=60)
@given(st.sampled_from([*TEMPLATES, None]), st.integers(1, 90), st.integers(24, 80), st.booleans())
def test_a_cut_prompt_keeps_the_marks_its_beginning_and_its_end(name, n, max_length, system):
    tokenizer = letters(TEMPLATES[name] if name else None)
    record = ask("IN" + "-" * n + "OUT", "yes")
    if system and name in ("think", "gemma", "plain"):
        record = Record((("system", "BE"), *record.messages), "yes")
    whole = InstructionDataset([record], tokenizer)
    bare = InstructionDataset([Record((*record.messages[:-1], ("user", "I")), "yes")], tokenizer)
    if bare.lengths[0] > max_length:
        with pytest.raises(ConfigurationError, match="none of 1 samples"):
            InstructionDataset([record], tokenizer, max_length=max_length, too_long="cut_prompt")
        return
    cut = InstructionDataset([record], tokenizer, max_length=max_length, too_long="cut_prompt")
    assert cut.lengths[0] <= max_length
    if whole.lengths[0] <= max_length:
        assert torch.equal(cut[0]["input_ids"], whole[0]["input_ids"])
        return
    before, after = (text(tokenizer, data.prompt(0)) for data in (whole, cut))
    header, _, tail = before.partition(record.prompt)
    assert after.startswith(header)
    assert after.endswith(tail)
    middle = after.removeprefix(header).removesuffix(tail)
    if len(middle) >= 12:
        assert middle.startswith("IN")
        assert middle.endswith("OUT")
        assert cut.lengths[0] > max_length - 16
    assert torch.equal(whole[0]["input_ids"][whole[0]["labels"] != -100], cut[0]["input_ids"][cut[0]["labels"] != -100])


def test_a_stream_made_by_hand_is_scored_by_content_too(tmp_path):
    tokenizer = letters(THINK)
    data = InstructionDataset([ask("say a", "a")], tokenizer)
    stream = Stream([Experience(0, "task", data, data)], name="own", kind="instruction", collate_fn=Pad())
    gap = fit_nothing(stream, Knows(tokenizer.convert_tokens_to_ids("<|end|>"), len(tokenizer)), tmp_path)
    for phase in ("step", "end"):
        assert gap.history.select(phase).scores.tolist() == [[0.0]]


def fit_nothing(stream, module, folder):
    gap = StabilityGap(score="token_accuracy", dir=folder, plot=False)
    data = StreamDataModule(stream, batch_size=2, steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[gap], **quiet).fit(module, datamodule=data)
    return gap


def test_bad_dropped_and_cut_held_out_samples_are_in_the_metrics(tmp_path):
    root = tmp_path / "tasks"
    for split, n in (("train", 1), ("eval", 2), ("test", 3)):
        (root / "task").mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": "a", "answer": "b"}, *[{"prompt": "a" * 99, "answer": "b"}, {"prompt": "c"}] * n]
        (root / "task" / f"{split}.json").write_text(json.dumps(rows))
    found = {}
    for too_long in ("drop", "cut_prompt"):
        stream = Instructions(tokenizer=letters(THINK), root=root, max_length=60, too_long=too_long, on_error="skip")
        fit_nothing(stream, Knows(0, 200), tmp_path)
        content = json.loads((tmp_path / "metrics.json").read_text())["stream"]
        found |= {key: value for key, value in content.items() if key.startswith(("bad", "dropped", "cut"))}
    numbers = {"": {"task": 1}, "_val": {"task": 2}, "_test": {"task": 3}}
    assert found == {f"{kind}{split}": value for kind in ("bad", "dropped", "cut") for split, value in numbers.items()}
