"""Instruction records, their encoding and padding, and the stream made of them."""

from __future__ import annotations

import json

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from language import objects, write_tasks
from torch.utils.data import ConcatDataset

from clkit import ConfigurationError, StreamDataModule
from clkit.data.batch import concatenate, widened
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.records import Record, read_records, records_of, write_records
from clkit.language.styles import AnswerStyles
from clkit.scenarios import Instructions, SplitTexts
from clkit.testing import small_tokenizer


def records(*pairs):
    return [Record((("user", prompt),), answer) for prompt, answer in pairs]


def test_a_prompt_and_an_answer_without_a_template_by_hand():
    # BOS p p p a a EOS with labels -100 x4, a, a, EOS: worked example 6 of the I-LoRA sheet
    tokenizer = small_tokenizer(chat=False)
    sample = InstructionDataset(records(("say yes no", "red blue")), tokenizer)[0]
    numbers = tokenizer.convert_tokens_to_ids(["<s>", "say", "yes", "no", "red", "blue", "</s>"])
    assert sample["input_ids"].tolist() == numbers
    assert sample["labels"].tolist() == [-100] * 4 + numbers[4:]


def test_the_chat_template_puts_the_roles_and_the_answer_ends_with_eos():
    tokenizer = small_tokenizer()
    record = Record((("system", "say"), ("user", "yes"), ("assistant", "no"), ("user", "name")), "red")
    dataset = InstructionDataset([record], tokenizer)
    text = "<system> say <user> yes <assistant> no </s> <user> name <assistant> red </s>"
    words = text.split()
    assert tokenizer.convert_ids_to_tokens(dataset[0]["input_ids"].tolist()) == words
    assert dataset[0]["labels"].tolist()[:-2] == [-100] * 10
    assert tokenizer.convert_ids_to_tokens(dataset[0]["labels"].tolist()[-2:]) == ["red", "</s>"]
    assert tokenizer.convert_ids_to_tokens(dataset.prompt(0).tolist()) == words[:-2]


def test_a_prompt_template_and_a_separator_stand_in_for_a_chat_template():
    tokenizer = small_tokenizer(chat=False)
    chat = (("system", "say"), ("user", "yes"), ("assistant", "no"), ("user", "name"))
    written = {"prompt_template": "what {prompt} is ", "separator": " ? "}
    dataset = InstructionDataset([Record(chat, "red")], tokenizer, **written)
    words = ["<s>", "say", "?", "what", "yes", "is", "?", "no", "?", "what", "name", "is", "red", "</s>"]
    assert tokenizer.convert_ids_to_tokens(dataset[0]["input_ids"].tolist()) == words
    assert tokenizer.convert_ids_to_tokens(dataset.prompt(0).tolist()) == words[:-2]
    with pytest.raises(ConfigurationError, match="several messages.* separator="):
        InstructionDataset([Record(chat, "red")], tokenizer)
    with pytest.raises(ConfigurationError, match="has no .prompt."):
        InstructionDataset(records(("say", "yes")), tokenizer, prompt_template="what is")
    with pytest.raises(ConfigurationError, match="this tokenizer has one; add chat=false"):
        InstructionDataset(records(("say", "yes")), small_tokenizer(), **written)


TALK = [
    {"role": "developer", "content": "say"},
    {"role": "user", "content": [{"type": "text", "text": "yes "}, {"type": "text", "text": "no"}]},
    {"role": "assistant", "content": "red"},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "blue"},
]


@pytest.mark.parametrize(
    ("item", "turns", "expected"),
    [
        ({"messages": TALK}, "last", [(["say", "yes no", "red", "12"], "blue")]),
        ({"messages": TALK}, "all", [(["say", "yes no"], "red"), (["say", "yes no", "red", "12"], "blue")]),
        ({"messages": [TALK[2], *TALK[1:3]]}, "all", [(["red", "yes no"], "red")]),
        ({"instruction": "say", "input": "", "output": "red"}, "last", [(["say"], "red")]),
        ({"instruction": "say", "input": "yes", "output": "red"}, "last", [(["say\n\nyes"], "red")]),
        (
            {"conversations": [{"from": "user", "value": "yes"}, {"from": "chatgpt", "value": "no"}]},
            "last",
            [(["yes"], "no")],
        ),
    ],
)
def test_records_as_practitioners_have_them(item, turns, expected):
    found = records_of(item, turns=turns)
    assert [([text for _, text in record.messages], record.answer) for record in found] == expected
    assert all(record.extra.get("instruction") == item.get("instruction") for record in found)


def test_keys_name_the_entries_of_a_file_and_turns_are_those_of_training(tmp_path):
    talk = {"chat": TALK[1:3] * 2, "id": 1}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(talk) + "\n")
    task = {"train": "train.jsonl", "test": "test.jsonl", "keys": {"messages": "chat"}}
    stream = Instructions({"talk": task}, tokenizer=small_tokenizer(), root=tmp_path, turns="all")
    assert [len(stream[0].train), len(stream[0].test)] == [2, 1]
    assert stream[0].train.records[0].extra == {"id": 1}
    with pytest.raises(ConfigurationError, match="line 1: it has no 'question', which keys names; its keys are 'chat'"):
        read_records(tmp_path / "train.jsonl", keys={"prompt": "question"})
    with pytest.raises(ConfigurationError, match="turns='some' is unknown"):
        Instructions({"talk": task}, tokenizer=small_tokenizer(), root=tmp_path, turns="some")


def test_a_template_gets_more_variables_and_may_refuse_messages():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}" + (
        "{{ shade }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    (record,) = records(("name", "red"))
    sample = InstructionDataset([record], tokenizer, template_options={"shade": "blue"})[0]
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist()) == ["blue", "name", "red", "</s>"]
    assert sample["labels"].tolist()[:2] == [-100, -100]
    with pytest.raises(ConfigurationError, match="refuses messages of system, user .no system here."):
        InstructionDataset([Record((("system", "say"), ("user", "yes")), "no")], tokenizer)


def test_long_samples_are_dropped_or_lose_the_middle_of_their_prompt_and_are_counted():
    tokenizer = small_tokenizer(chat=False)
    data = records(("yes yes", "red"), ("1 2 3 4 5", "blue"), ("no", "1 2 3 4 5 6 7"))
    with pytest.warns(UserWarning, match="few: 2 samples have more than 6 tokens and are left out"):
        dropped = InstructionDataset(data, tokenizer, max_length=6, name="few")
    assert (dropped.n_dropped, [record.answer for record in dropped.records]) == (2, ["red"])
    with pytest.warns(
        UserWarning, match="1 samples .* cut in the middle of their prompt; its beginning and end .* stay"
    ):
        cut = InstructionDataset(data, tokenizer, max_length=6, too_long="cut_prompt")
    assert (cut.n_dropped, cut.n_cut) == (1, 1)
    assert tokenizer.convert_ids_to_tokens(cut[1]["input_ids"].tolist()) == ["<s>", "5", "blue", "</s>"]
    assert cut[1]["labels"].tolist()[:2] == [-100] * 2
    with (
        pytest.raises(ConfigurationError, match="none of 3 samples has 2 tokens or fewer"),
        pytest.warns(match="3 samples"),
    ):
        InstructionDataset(data, tokenizer, max_length=2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from(["right", "left"]))
def test_padding_keeps_every_token_and_each_text_begins_at_position_0(lengths, side):
    samples = [{"input_ids": torch.arange(1, n + 1) * 7, "labels": torch.arange(n)} for n in lengths]
    batch = Pad(side)(samples)
    for row, sample in enumerate(samples):
        used = batch["attention_mask"][row].bool()
        assert used.sum() == len(sample["input_ids"])
        assert bool(used[0] if side == "right" else used[-1])
        assert torch.equal(batch["input_ids"][row][used], sample["input_ids"])
        assert torch.equal(batch["labels"][row][used], sample["labels"])
        assert (batch["labels"][row][~used] == -100).all()
        if side == "left":
            assert batch["position_ids"][row][used].tolist() == list(range(len(sample["input_ids"])))


def test_batches_of_different_widths_are_concatenated_with_labels_ignored_in_the_padding():
    short, long = (Pad()([{"input_ids": torch.full((n,), n), "labels": torch.full((n,), n)}]) for n in (2, 4))
    both = concatenate([short, long])
    assert both["input_ids"].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]]
    assert both["labels"].tolist() == [[2, 2, -100, -100], [4, 4, 4, 4]]
    assert both["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert widened(long, {"input_ids": 4})["input_ids"] is long["input_ids"]


def test_files_of_either_kind_are_read_and_written_back(tmp_path):
    plain = objects("options", 4)
    chat = [{"messages": [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"}], "id": 3}]
    for name, items in (("plain.json", plain), ("chat.jsonl", chat)):
        path = tmp_path / name
        path.write_text(json.dumps(items) if name.endswith("json") else "\n\n".join(map(json.dumps, items)) + "\n")
        read, bad = read_records(path)
        assert bad == 0
        assert [record.answer for record in read] == [
            item["answer"] if "answer" in item else item["messages"][-1]["content"] for item in items
        ]
        write_records(path, read)
        assert read_records(path)[0] == read
    assert read_records(tmp_path / "plain.json")[0][0].extra == {"choices": ["A", "B", "C"]}
    assert read_records(tmp_path / "chat.jsonl")[0][0].extra == {"id": 3}


BAD = {
    '{"prompt": "a"}': "line 2: it has no 'answer'; its keys are 'prompt'",
    '{"prompt": 3, "answer": "b"}': "line 2: its prompt is int and must be text",
    '{"prompt": "a", "answer": "  "}': "line 2: its answer is empty",
    '{"prompt": "a" "answer"}': "line 2: no JSON",
    '["a", "b"]': "line 2: a record is an object, not list",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 2: the last of its messages is the user's",
    '{"messages": [{"role": "human", "content": "a"}]}': "line 2: message 0 has the role 'human'",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "line 2: nothing is asked",
}


@pytest.mark.parametrize(("line", "message"), BAD.items())
def test_a_bad_record_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + '\n{"answer": "d", "prompt": "c"}\n')
    with pytest.raises(ConfigurationError, match=f"train.jsonl, {message}"):
        read_records(path)
    kept, bad = read_records(path, on_error="skip")
    assert ([record.answer for record in kept], bad) == (["b", "d"], 1)


def test_a_bad_item_of_a_json_list_is_named_by_its_line(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[\n  {"prompt": "a",\n   "answer": "b"},\n\n  {"prompt": "c"},\n  {"prompt":"e","answer":"f"}\n]')
    with pytest.raises(ConfigurationError, match="line 5: it has no 'answer'"):
        read_records(path)
    assert read_records(path, on_error="skip")[1] == 1
    for text, message in (
        ('[{"prompt": "a", "answer": "b"}', "line 1: .*',' or the closing"),
        ('[\n{"prompt": "a" "answer": "b"}]', "line 2: .*delimiter"),
        ('{"prompt": "a", "answer": "b"}', "starts with no"),
        ("[]", "no usable record"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            read_records(path, on_error="skip")


def make_stream(root, **options):
    return Instructions(tokenizer=small_tokenizer(), root=write_tasks(root), **options)


def test_a_folder_of_tasks_in_alphabetical_or_given_order(tmp_path):
    root = write_tasks(tmp_path)
    (root / "sums" / "task.json").write_text('{"metric": "number"}')
    stream = Instructions(tokenizer=small_tokenizer(), root=root, metrics={"options": "letter"})
    assert [experience.name for experience in stream] == ["colours", "options", "sums"]
    assert [experience.test.metric for experience in stream] == ["exact_match", "letter", "number"]
    assert [len(part) for e in stream for part in (e.train, e.val, e.test)] == [24, 6, 9] * 3
    assert (stream.kind, stream.n_classes, stream.model_arguments) == ("instruction", None, {})
    shorter = Instructions(["sums", "colours"], tokenizer=small_tokenizer(), root=root, limit={"train": 5})
    assert [(e.name, len(e.train), len(e.test)) for e in shorter] == [("sums", 5, 9), ("colours", 5, 9)]
    assert shorter[:1].collate_fn is shorter.collate_fn


def test_files_and_hub_data_sets_as_tasks(tmp_path):
    pytest.importorskip("datasets")
    root = write_tasks(tmp_path)
    lines = "".join(json.dumps({"q": item["prompt"], "a": item["answer"]}) + "\n" for item in objects("sums", 7))
    (tmp_path / "sums.jsonl").write_text(lines)
    files = {split: str(tmp_path / "sums.jsonl") for split in ("train", "validation")}
    hub = {"hub": "json", "splits": {"train": "train", "test": "validation"}, "keys": {"prompt": "q", "answer": "a"}}
    tasks = {
        "files": {"train": ["options/train.json", "options/eval.json"], "test": "options/test.json"},
        "hub": {**hub, "options": {"data_files": files, "cache_dir": str(tmp_path / "cache")}},
    }
    stream = Instructions(tasks, tokenizer=small_tokenizer(), root=root)
    assert [(e.name, len(e.train), len(e.test)) for e in stream] == [("files", 30, 9), ("hub", 7, 7)]
    assert [record.answer for record in stream[1].train.records] == [item["answer"] for item in objects("sums", 7)]
    with pytest.raises(ConfigurationError, match="columns question, a"):
        Instructions(
            {"hub": {**tasks["hub"], "keys": {"prompt": "question", "answer": "a"}}}, tokenizer=small_tokenizer()
        )


FILES = {"train": "sums/train.json", "test": "sums/test.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["sum"]}, "There is no folder .*sum; .* has colours, options, sums"),
        ({"tasks": ["sums", "sums"]}, "names 'sums' twice"),
        ({"tasks": "sums"}, "one text"),
        ({"tasks": {"mine": {"train": "sums/train.json"}}}, "'mine' has no test split"),
        (
            {"tasks": {"mine": {**FILES, "metrics": "number"}}},
            "'mine' has an unknown key 'metrics'; did you mean metric",
        ),
        ({"tasks": {"mine": {**FILES, "val": "a.json"}}}, "'mine' has an unknown key 'val'; did you mean eval"),
        ({"tasks": {"mine": {"hub": "x", "split": {}}}}, "'mine' has an unknown key 'split'; did you mean splits"),
        (
            {"tasks": {"mine": {"hub": "x", "splits": {"val": "y"}}}},
            "splits has an unknown key 'val'; did you mean eval",
        ),
        ({"template_options": {"enable_thinkin": False}}, "'enable_thinkin', which the chat template .* not mention"),
        ({"template_options": {"messages": 1}, "chat": False}, "is not used for .chat=false."),
        ({"metrics": {"sum": "number"}}, "metrics names 'sum', which is no task"),
        ({"side": "both"}, "side='both'"),
        ({"chat": True, "tokenizer": small_tokenizer(chat=False)}, "no chat template"),
    ],
)
def test_what_cannot_be_a_stream_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        Instructions(**{"tokenizer": small_tokenizer(), "root": write_tasks(tmp_path), **options})


def test_an_empty_root_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no folder of a task"):
        Instructions(tokenizer=small_tokenizer(), root=tmp_path / "none")


def test_answer_styles_change_training_records_alone(tmp_path):
    root = write_tasks(tmp_path)
    (root / "colours" / "task.json").write_text('{"style": "short_answer", "format": "name the colour :"}')
    stream = Instructions(["colours"], tokenizer=small_tokenizer(), root=root, styles=AnswerStyles(50.0))
    styles = [record.extra["style"] for record in stream[0].train.records]
    assert {style: styles.count(style) for style in stream.style_reports["colours"].counts} == (
        stream.style_reports["colours"].counts
    )
    assert styles.count("short_answer") == 12
    rewritten = [record for record in stream[0].train.records if record.extra["style"] == "yes_no"]
    assert {record.answer for record in rewritten} == {"Yes", "No"}
    assert not any("name the colour" in record.prompt for record in rewritten)
    assert all("style" not in record.extra for record in stream[0].test.records)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 7))
def test_grouping_by_length_is_a_permutation_with_less_padding(lengths, size):
    from clkit.data.order import group_by_length
    from clkit.rng import private_rng

    given_order, n = torch.arange(len(lengths)).flip(0), torch.tensor(lengths)
    order = group_by_length(private_rng(0), given_order, n[given_order], size)
    assert sorted(order.tolist()) == list(range(len(lengths)))

    def padded(chosen):
        return sum(int(n[part].max()) * len(part) for part in chosen.split(size))

    if len(lengths) <= 50 * size and len(lengths) % size == 0:
        assert padded(order) <= padded(given_order)


def test_a_stream_is_served_in_padded_batches_grouped_by_length(tmp_path):
    stream = make_stream(tmp_path)
    data = StreamDataModule(stream, batch_size=4, group_by_length=True)
    batches = list(data.train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == 24
    spread = [int(b["attention_mask"].sum(1).max() - b["attention_mask"].sum(1).min()) for b in batches]
    assert max(spread) <= 2 < max(stream[0].train.lengths) - min(stream[0].train.lengths)
    joint = StreamDataModule(stream, batch_size=4, group_by_length=True)
    joint.train_sets = [ConcatDataset([e.train for e in stream])] * 3
    assert sum(len(batch["input_ids"]) for batch in joint.train_dataloader()) == 72


def write_classes(root, classes=("red", "green", "blue", "one"), n: int = 12):
    for split, size in (("train", n), ("test", n // 3)):
        items = [{"prompt": f"say {name} {'yes ' * (i % 5)}", "answer": name} for name in classes for i in range(size)]
        root.mkdir(exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(items))
    return root


def test_classes_of_texts_in_alphabetical_or_given_order(tmp_path):
    folder = write_classes(tmp_path / "words")
    stream = SplitTexts(folder, tokenizer=small_tokenizer(), n_experiences=2)
    assert [e.name for e in stream] == ["blue green", "one red"]
    assert [e.classes for e in stream] == [(0, 1), (2, 3)]
    assert (stream.n_classes, stream.kind, stream.model_arguments) == (4, "class-incremental", {"n_classes": 4})
    tokenizer = small_tokenizer()
    for experience in stream:
        assert (len(experience.train), len(experience.test)) == (24, 8)
        for sample in (experience.train[i] for i in range(24)):
            name = tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())[1]
            assert ["blue", "green", "one", "red"][sample["labels"]] == name
    other = SplitTexts(folder, tokenizer=tokenizer, class_order=["red", "blue", "one"], classes_per_experience=[1, 2])
    assert [(e.name, e.classes) for e in other] == [("red", (3,)), ("blue one", (0, 2))]
    with pytest.warns(UserWarning, match="texts have more than 3 tokens; the end is cut off"):
        SplitTexts(folder, tokenizer=tokenizer, n_experiences=2, max_length=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experiences": 3}, "words .blue, green, one, red. has 4 classes; n_experiences=3 does not divide"),
        ({"class_order": ["red", "yellow"]}, "names 'yellow', which is no class of words"),
        ({"class_order": "random"}, "'shuffled'"),
    ],
)
def test_classes_that_cannot_be_divided_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        SplitTexts(write_classes(tmp_path / "words"), tokenizer=small_tokenizer(), **options)


def test_a_class_that_is_only_held_out_is_refused(tmp_path):
    folder = write_classes(tmp_path / "words")
    (folder / "test.json").write_text('[{"prompt": "say two", "answer": "two"}]')
    with pytest.raises(ConfigurationError, match="the class 'two' of test does not occur in train"):
        SplitTexts(folder, tokenizer=small_tokenizer())
    with pytest.raises(ConfigurationError, match="There is no folder"):
        SplitTexts(tmp_path / "none", tokenizer=small_tokenizer())


def composed(*overrides):
    with initialize_config_module("clkit.conf", version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("scenario", ["instructions", "split_texts"])
def test_runs_on_texts_have_defaults_of_their_own_that_the_user_can_override(scenario):
    texts, images = composed(f"scenario={scenario}"), composed("scenario=split_digits")
    assert texts.data.group_by_length
    assert texts.data.batch_size < images.data.batch_size
    for key in ("batch_size", "subset"):
        assert texts.evaluation[key] < images.evaluation[key]
    assert texts.evaluation.every > images.evaluation.every
    assert texts.evaluation.score == ("token_accuracy" if scenario == "instructions" else "accuracy")
    assert texts.evaluation.keys() == images.evaluation.keys()
    own = composed(f"scenario={scenario}", "data.batch_size=3", "schedule=log_spaced")
    assert (own.data.batch_size, own.evaluation.every.dense) == (3, 50)
    assert composed("experiment=smollm2_instructions").evaluation.every == 5


def test_the_experiment_on_formats_has_a_size_for_a_gpu() -> None:
    small, large = composed("experiment=smollm2_formats"), composed("experiment=smollm2_formats_gpu")
    for config in (small, large):
        assert config.scenario.tasks == ["drawer", "label", "shelf", "show"]
        assert set(config.callbacks) == {"answers", "reset_optimizer"}
        assert config.model.scheduler.num_training_steps == config.data.steps
        assert config.evaluation.split == "val"
    assert (large.data.steps, large.data.batch_size, large.model.adapter.rank) == (200, 16, 64)
    assert large.callbacks.answers.subset == 200
    assert large.model.optimizer.lr == 5e-4
    assert (small.trainer.accelerator, large.trainer.accelerator) == ("cpu", "auto")
