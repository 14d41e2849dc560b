"""Records with images: how they are read, encoded, put into batches and remembered."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from vision import FAMILIES, in_memory, save_picture, some_records

from clkit import ConfigurationError, StreamDataModule
from clkit.data.batch import concatenate
from clkit.data.columns import size_of, take
from clkit.data.images import Images
from clkit.language.answers import score_answer
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.images import ImageFolder, ImageTable, decoded
from clkit.language.records import Record, read_records, records_of, write_records
from clkit.language.styles import AnswerStyles
from clkit.memory.buffer import ReservoirBuffer
from clkit.scenarios import Instructions
from clkit.testing import small_image_instructions, small_processor

PLAIN = {"prompt": "name the colour", "answer": "red"}


@pytest.fixture
def folder(tmp_path):
    save_picture(tmp_path / "task" / "a.png", (40, 30))
    save_picture(tmp_path / "root" / "deep" / "b.jpg", (20, 50))
    return tmp_path


def write(folder, name, items):
    path = folder / "task" / name
    path.write_text(json.dumps(items) if name.endswith("json") else "".join(json.dumps(i) + "\n" for i in items))
    return path


def read(folder, name, items, **options):
    return read_records(write(folder, name, items), find=ImageFolder(folder / "task", folder / "root"), **options)[0]


def test_all_forms_of_a_record_with_an_image_read_the_same(folder):
    content = [{"type": "image"}, {"type": "text", "text": "name the colour"}]
    inline = [{"type": "image", "path": "a.png"}, content[1]]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    turns = [{"from": "human", "value": "name the colour\n<image>"}, {"from": "gpt", "value": "red"}]
    items = [
        {**PLAIN, "image": "a.png"},
        {**PLAIN, "images": ["a.png"]},
        {"image": "a.png", "prompt": "<image>\nname the colour", "answer": "red"},
        {"image": "a.png", "text": "name the colour", "answer": "red"},
        {"messages": [{"role": "user", "content": content}, answer], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": inline}, answer]},
        {"messages": [{"role": "user", "content": "name the colour"}, answer], "image": "a.png"},
        {"image": "a.png", "conversations": turns},
    ]
    for name in ("train.json", "train.jsonl"):
        assert read(folder, name, items) == [read(folder, name, items)[0]] * len(items)
    (record, *_) = read(folder, "train.json", items)
    assert (record.messages, record.images[0].size) == ((("user", "name the colour"),), (40, 30))
    write_records(folder / "task" / "again.json", [record])
    assert read(folder, "again.json", json.loads((folder / "task" / "again.json").read_text())) == [record]


def test_paths_are_relative_to_the_root_or_the_file_or_absolute(folder):
    for name, place in (
        ("a.png", folder / "task" / "a.png"),
        ("deep/b.jpg", folder / "root" / "deep" / "b.jpg"),
        (str(folder / "root" / "deep" / "b.jpg"), folder / "root" / "deep" / "b.jpg"),
    ):
        (record,) = read(folder, "train.json", [{**PLAIN, "image": name}])
        assert record.images[0].path == str(place)
    shutil.copy(folder / "root" / "deep" / "b.jpg", folder / "root" / "a.png")
    (record,) = read(folder, "train.json", [{**PLAIN, "image": "a.png"}])
    assert record.images[0].path == str(folder / "root" / "a.png")


BAD = {
    "missing": ({"image": "no.png"}, "its image 'no.png': there is no such file"),
    "text": ({"image": "train.jsonl"}, "its image 'train.jsonl': it is no image that can be read"),
    "escape": ({"image": "../root/deep/b.jpg"}, "the path leaves its folder"),
    "web": ({"image": "https://example.org/a.png"}, "addresses are not fetched"),
    "number": ({"image": 3}, "its image is 3 and must be a path"),
    "few": ({"image": "a.png", "prompt": "<image> and <image> ?"}, "2 places for images .* and 1 images"),
    "many": ({"images": ["a.png", "a.png"], "prompt": "<image> ?"}, "1 places for images .* and 2 images"),
    "none": ({"prompt": "say <image>"}, "1 places for images .* and 0 images"),
    "answer": ({"image": "a.png", "answer": "<image>"}, "places for images"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_image_is_named_by_file_and_line_or_skipped_and_counted(folder, change, message):
    items = [{**PLAIN, "image": "a.png"}, {**PLAIN, **change}, PLAIN]
    with pytest.raises(ConfigurationError, match=f"train.jsonl, line 2: .*{message}"):
        read(folder, "train.jsonl", items)
    kept = read(folder, "train.jsonl", items, on_error="skip")
    assert ([len(record.images) for record in kept], kept.n_bad, kept.n_objects) == ([1, 0], 1, 3)


def test_each_answer_of_a_conversation_is_a_record_that_knows_the_turns_before(folder):
    turns = [("gpt", "hello"), ("human", "<image>\nname it"), ("gpt", "red"), ("human", "and ?"), ("gpt", "blue")]
    item = {"id": "7", "image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    first, second = read(folder, "train.json", [item])
    assert (first.messages, first.answer) == ((("user", "name it"),), "red")
    assert second.messages == (("user", "name it"), ("assistant", "red"), ("user", "and ?"))
    assert (first.images, second.answer, second.extra) == (second.images, "blue", {"id": "7"})
    later = [("human", "name it"), ("gpt", "red"), ("human", "and <image> ?"), ("gpt", "blue")]
    item["conversations"] = [{"from": who, "value": text} for who, text in later]
    assert [len(record.images) for record in read(folder, "train.json", [item])] == [0, 1]


def test_without_a_processor_images_are_no_part_of_a_record():
    (record,) = records_of({**PLAIN, "image": "a.png", "prompt": "say <image>"})
    assert (record.prompt, record.images, record.extra) == ("say <image>", (), {"image": "a.png"})


def test_an_image_is_upright_and_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    save_picture(tmp_path / "turned.jpg", (30, 20), exif=exif)
    Image.new("LA", (8, 9)).save(tmp_path / "grey.png")
    for name, size in (("turned.jpg", (20, 30)), ("grey.png", (8, 9))):
        source = ImageFolder(tmp_path)(name)
        assert (source.size, decoded(source).size, decoded(source).mode) == (size, size, "RGB")


def test_the_label_mask_of_two_images_and_a_text_by_hand():
    # worked example 7.1 of the sheet on vision and language: A and B with one image of four tokens, C without
    processor = small_processor(chat=False)
    tokens = processor.tokenizer.convert_tokens_to_ids
    image, end = processor.image_token_id, processor.tokenizer.eos_token_id
    one, other = in_memory((16, 16), 1), in_memory((30, 16), 2)
    data = InstructionDataset(
        [
            Record((("user", "what is name"),), "red", images=(one,)),
            Record((("user", "is"),), "red green blue", images=(other,)),
            Record((("user", "what is name"),), "blue"),
        ],
        processor,
    )
    batch = Pad(images=data.images)([data[i] for i in range(3)])
    say = [tokens(word) for word in ("what", "is", "name", "red", "green", "blue")]
    a = [1, *[image] * 4, *say[:3], say[3], end]
    b = [1, *[image] * 4, say[1], *say[3:], end]
    c = [1, *say[:3], say[5], end]
    assert batch["input_ids"].tolist() == [a, b, [*c, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [*[-100] * 8, say[3], end],
        [*[-100] * 6, *say[3:], end],
        [*[-100] * 4, say[5], end, *[-100] * 4],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 10, [1] * 10, [1] * 6 + [0] * 4]
    assert batch["images"].numbers.tolist() == [[0], [1], [-1]]
    assert {n: part["pixel_values"].shape for n, part in batch["images"].pixels.items()} == {
        0: (1, 3, 16, 16),
        1: (1, 3, 16, 16),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_images_stand_in_the_tokens_as_the_processor_puts_them(family):
    processor, _ = FAMILIES[family]()
    records = some_records()
    data = InstructionDataset(records, processor)
    for record, sample in zip(records, (data[i] for i in range(4)), strict=True):
        marks = {"llava": "<image>", "llava_next": "<image>", "idefics3": "<image>", "smolvlm": "<image>"}
        marks |= {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>"}
        mark = marks[family]
        prompt = record.prompt.replace("<image>", mark) if "<image>" in record.prompt else record.prompt
        first = mark * (len(record.images) if "<image>" not in record.prompt else 0)
        text = f"USER: {first}{prompt}\nASSISTANT: {record.answer}</s>"
        images = [decoded(image) for image in record.images]
        whole = processor(text=[text], images=[images] if images else None, text_kwargs={"add_special_tokens": False})
        assert sample["input_ids"].tolist() == list(whole["input_ids"][0])
        answer = processor.tokenizer(f"{record.answer}</s>", add_special_tokens=False)["input_ids"]
        n = int((sample["labels"] != -100).sum())
        assert processor.tokenizer.decode(sample["labels"][-n:]).strip() == f"{record.answer}</s>"
        assert abs(n - len(answer)) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_prompts_leaves_every_image_and_answer_whole(family):
    processor, _ = FAMILIES[family]()
    long = [
        Record((("system", "yes"), ("user", f"{'what is in ' * 40}{r.prompt}")), r.answer, images=r.images)
        for r in some_records()
    ]
    whole = InstructionDataset(long, processor, max_length=2000)
    with pytest.warns(UserWarning, match="4 samples have more than 160 tokens and are cut"):
        cut = InstructionDataset(long, processor, max_length=160, too_long="cut_prompt")
    token = cut.images.token_id
    for i in range(4):
        assert cut.lengths[i] == len(cut[i]["input_ids"]) <= 160 < whole.lengths[i]
        assert (cut[i]["input_ids"] == token).sum() == (whole[i]["input_ids"] == token).sum()
        both = [data[i]["labels"][data[i]["labels"] != -100].tolist() for data in (cut, whole)]
        assert both[0] == both[1]
    with pytest.warns(UserWarning, match="left out"):
        few = InstructionDataset(some_records(), processor, max_length=40)
    assert few.n_dropped > 0


def test_a_models_own_token_in_a_text_is_no_image():
    processor, _ = FAMILIES["qwen2_vl"]()
    data = InstructionDataset([Record((("user", "say <|image_pad|> ?"),), "<|image_pad|> yes")], processor)
    assert not (data[0]["input_ids"] == data.images.token_id).any()


def test_a_template_that_loses_an_image_is_refused():
    processor, _ = FAMILIES["llava"]()
    processor.chat_template = processor.chat_template.replace("{% if c['type']", "{% if loop.first and c['type']")
    record = some_records()[1]
    with pytest.raises(ConfigurationError, match="has 2 images, but the chat template writes . places"):
        InstructionDataset([record], processor)


def stream_of(folder, **options):
    processor = options.pop("processor", None) or small_processor()
    return Instructions(["task"], processor=processor, root=folder, image_root=folder / "root", **options)


def test_a_folder_of_records_makes_the_same_batches_with_workers_and_without(folder):
    items = [{**PLAIN, "image": "a.png"}, {**PLAIN, "images": ["deep/b.jpg", "a.png"]}, PLAIN] * 4
    for split in ("train", "test", "eval"):
        write(folder, f"{split}.json", items)
    stream = stream_of(folder)
    assert (len(stream[0].train), len(stream.images)) == (12, 2)
    found = []
    for workers in (0, 2):
        data = StreamDataModule(stream, batch_size=4, num_workers=workers)
        found.append(list(data.train_dataloader()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["images"].numbers, other["images"].numbers)
        assert one["images"].pixels.keys() == other["images"].pixels.keys()
        for n, pixels in one["images"].pixels.items():
            assert torch.equal(pixels["pixel_values"], other["images"].pixels[n]["pixel_values"])


def test_pixels_are_not_read_before_a_batch_is_made_and_a_broken_image_is_named(folder):
    whole = (folder / "root" / "deep" / "b.jpg").read_bytes()
    (folder / "root" / "deep" / "b.jpg").write_bytes(whole[: len(whole) // 2])
    for split in ("train", "test"):
        write(folder, f"{split}.json", [{**PLAIN, "image": "deep/b.jpg"}])
    stream = stream_of(folder)
    with pytest.raises(ConfigurationError, match=r"root/deep/b.jpg cannot be read"):
        stream.collate_fn([stream[0].train[0]])


def test_an_image_that_changes_its_size_during_a_run_is_named(folder):
    for split in ("train", "test"):
        write(folder, f"{split}.json", [{**PLAIN, "image": "a.png"}])
    stream = stream_of(folder, processor=FAMILIES["llava_next"]()[0])
    save_picture(folder / "task" / "a.png", (90, 20))
    with pytest.raises(ConfigurationError, match=r"The image a.png takes \d+ tokens, but a blank one of its size"):
        stream.collate_fn([stream[0].train[0]])


def test_published_sizes_are_compared_with_the_files(folder):
    for split in ("train", "test"):
        write(folder, f"{split}.json", [{**PLAIN, "image": "a.png"}] * 3)
    tasks = {"task": {"train": "task/train.json", "test": "task/test.json", "sizes": {"train": 3, "test": 5}}}
    with pytest.warns(UserWarning, match="task/test: the published data has 5 records, these files have 3"):
        Instructions(tasks, processor=small_processor(), root=folder)


def test_either_a_tokenizer_or_a_processor_is_needed(folder):
    with pytest.raises(ConfigurationError, match="needs a tokenizer, or, with images, a processor"):
        Instructions(["task"], root=folder)


@pytest.mark.parametrize("listed", [False, True])
def test_a_data_set_of_hugging_face_with_a_column_of_images(tmp_path, listed):
    datasets = pytest.importorskip("datasets")
    paths = [str(save_picture(tmp_path / f"{i}.png", (20 + i, 16), i)) for i in range(3)]
    feature = datasets.Sequence(datasets.Image()) if listed else datasets.Image()
    rows = {
        "picture": [*([[path] for path in paths] if listed else paths), None],
        "question": ["name the colour"] * 4,
        "colour": ["red", "green", "blue", "no"],
    }
    text = datasets.Value("string")
    features = datasets.Features({"picture": feature, "question": text, "colour": text})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    source = {
        "hub": "parquet",
        "splits": {"train": "train", "test": "train"},
        "keys": {"prompt": "question", "answer": "colour", "images" if listed else "image": "picture"},
        "options": {"data_files": str(tmp_path / "rows.parquet"), "cache_dir": str(tmp_path / "cache")},
    }
    stream = Instructions({"task": source}, processor=small_processor(), root=tmp_path)
    data = stream[0].train
    assert [record.images[0].size if record.images else None for record in data.records] == [
        (20, 16),
        (21, 16),
        (22, 16),
        None,
    ]
    assert data.records[0].extra == {"question": "name the colour", "colour": "red"}
    batch = stream.collate_fn([data[i] for i in (2, 3)])
    expected = stream.images.processor(text=["<image>"], images=[Image.open(paths[2])], return_tensors="pt")
    assert torch.equal(batch["images"].pixels[2]["pixel_values"], expected["pixel_values"])


def test_memories_keep_the_numbers_of_images_with_their_texts():
    stream = small_image_instructions()
    data, collate = stream[0].train, stream.collate_fn
    buffer = ReservoirBuffer(8)
    batch = collate([data[i] for i in range(8)])
    buffer.insert(batch)
    kept = buffer.contents()
    assert (torch.equal(kept["input_ids"], batch["input_ids"]), kept["images"].pixels) == (True, {})
    assert kept["images"].numbers.tolist() == batch["images"].numbers.tolist()
    other = ReservoirBuffer(8)
    other.load_state_dict(buffer.state_dict())
    assert other.contents()["images"].numbers.tolist() == batch["images"].numbers.tolist()
    rows = take(batch, torch.tensor([5, 1]))
    joined = concatenate([rows, kept])
    assert size_of(joined) == 10
    for row, i in enumerate([5, 1, *range(8)]):
        numbers = joined["images"].numbers[row]
        assert numbers[numbers >= 0].tolist() == data[i]["images"].tolist()
    assert set(joined["images"].pixels) == set(batch["images"].pixels)


def test_images_of_no_sample_take_no_room():
    joined = Images.joined([Images(torch.empty(2, 0, dtype=torch.int64)), Images(torch.tensor([[3, -1]]))])
    assert joined.numbers.tolist() == [[-1, -1], [-1, -1], [3, -1]]
    assert joined.used() == [3]


def test_answer_styles_keep_the_image_of_every_sample():
    records = [Record((("user", f"name {i}"),), ("red", "blue")[i % 2], images=(f"{i}.png",)) for i in range(20)]
    styled, report = AnswerStyles(50.0, styles=("yes_no", "multiple_choice"))(records, "task")
    assert report.chosen == 10
    assert [record.images for record in styled] == [record.images for record in records]


def test_the_table_counts_an_image_once():
    table = ImageTable(small_processor())
    assert [table.add(in_memory((16, 16), seed)) for seed in (1, 2, 1)] == [0, 1, 0]


BOXES = [
    ("[0.10, 0.20, 0.40, 0.50]", 1.0, 1.0),
    ("[0.1, 0.2, 0.4, 0.5]", 1.0, 1.0),  # the reference code reads the last number as 0
    ("the box is 0.1 0.2 0.4 0.5", 1.0, 0.0),
    ("[0.1, 0.2, 0.4]", 0.0, 0.0),
    ("[0.4, 0.5, 0.1, 0.2]", 0.0, 0.0),
    ("[0.1, 0.2, 0.4, 0.34]", 0.0, 0.0),  # IoU 0.14 / 0.3
    ("[0.1, 0.2, 0.4, 0.36]", 1.0, 1.0),  # IoU 0.16 / 0.3
    ("", 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "lenient", "strict"), BOXES)
def test_a_box_is_right_where_it_overlaps_by_more_than_half(text, lenient, strict):
    scores = [score_answer("box_iou", text, "[0.10, 0.20, 0.40, 0.50]", strict=s) for s in (False, True)]
    assert scores == [lenient, strict]


def test_an_answer_contains_words_not_parts_of_them():
    for text, lenient, strict in (("It is no.", 1.0, 0.0), ("normal", 0.0, 0.0), ("no", 1.0, 1.0), ("", 0.0, 0.0)):
        assert [score_answer("contains", text, "no", strict=s) for s in (False, True)] == [lenient, strict]
