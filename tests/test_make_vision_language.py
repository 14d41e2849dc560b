"""The tool that makes the home-scale stream of texts and images: answers, leaks, and the model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image, ImageDraw
from scipy import ndimage

from clkit.errors import ConfigurationError
from clkit.language.models import VisionLanguage, load_processor
from clkit.scenarios import Instructions
from clkit.testing import small_language_module, small_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_vision_language
import vision_language_data as made
import vision_language_model as made_of
import vision_language_sources as sources_of
from reproduce_vision_language import methods
from vision_language_leaks import check_leaks
from vision_language_sources import Sources

DRAWN = ("compare", "ground", "scenes")
WORDS = {"one": 1, "two": 2, "three": 3}
SHARE = 0.03


def emoji_folders(root: Path) -> Sources:
    """Both vendors' folders, with drawings in place of art: forty things and twelve faces."""
    listed = []
    for vendor in ("twitter", "google"):
        rng = np.random.default_rng(len(vendor))
        folder = root / vendor / "img" / vendor / "64"
        folder.mkdir(parents=True)
        listed = []
        for i in range(52):
            name = f"{'thing' if i < 40 else 'face'} {chr(97 + i % 26)}{'x' * (i // 26 + 1)}"
            art = Image.new("RGBA", (64, 64))
            pen = ImageDraw.Draw(art)
            for _ in range(4):
                x, y, w, h = rng.integers(0, 40, 4).tolist()
                pen.rectangle((x, y, x + w + 8, y + h + 8), fill=(*rng.integers(0, 200, 3).tolist(), 255))
            art.save(folder / f"{i}.png")
            group = "animal-mammal" if i < 40 else "face-smiling"
            listed.append({"name": name.upper(), "subcategory": group, "category": "X", "image": f"{i}.png"})
            listed[-1] |= {"sort_order": i, "has_img_twitter": True, "has_img_google": True}
        (root / vendor / "emoji.json").write_text(json.dumps(listed))
    return Sources(root / "twitter", root / "google")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks whose data is there, a few samples each, and the captions."""
    folder = tmp_path_factory.mktemp("home")
    names = [name for name in made.STREAM if name != "garments" or sources_of.FASHION.is_dir()]
    make_vision_language.make_tasks(folder, names, SHARE, 0, emoji_folders(folder / "emoji"))
    return folder


def records(root: Path, task: str, split: str = "train") -> list[dict]:
    return json.loads((root / "home_vlm" / task / f"{split}.json").read_text())


def picture(root: Path, task: str, record: dict) -> np.ndarray:
    return np.asarray(Image.open(root / "home_vlm" / task / record["image"]), dtype=np.int64)


def parts(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """What is not background, piece by piece."""
    return ndimage.label(np.abs(pixels - pixels[0, 0]).max(2) > 40)


def of_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels - made.COLOURS[colour]).max(2) < 30


def test_layout_and_the_form_of_answers(root: Path) -> None:
    forms = {"garments": "[A-D]", "things": "[a-z-]+( [a-z]+)?", "numbers": "[0-9]", "compare": "Yes|No"}
    forms |= {"ground": r"\[0\.\d\d, 0\.\d\d, [01]\.\d\d, [01]\.\d\d\]", "scenes": r"[A-Z][a-z ]+\."}
    for folder in (root / "home_vlm").iterdir():
        about = json.loads((folder / "task.json").read_text())
        for split, n in made.TASKS[folder.name].sizes.items():
            found = records(root, folder.name, split)
            assert len(found) == round(SHARE * n)
            for record in found:
                assert re.fullmatch(forms[folder.name], record["answer"])
                assert record["prompt"].endswith("\n" + about["format"])
    styles = [(made.TASKS[name].metric, made.TASKS[name].style) for name in made.STREAM]
    assert len(set(styles)) == len(styles)


def test_counts_are_the_pieces_in_the_picture(root: Path) -> None:
    own = [record for record in records(root, "numbers") if record["kind"] == "count"]
    assert len(own) > 20
    for record in own:
        assert parts(picture(root, "numbers", record))[1] == int(record["answer"])


def test_comparisons_are_right_by_the_pixels(root: Path) -> None:
    for record in records(root, "compare"):
        pixels = picture(root, "compare", record)
        labels, n = parts(pixels)
        assert n == 2
        boxes = sorted(ndimage.find_objects(labels), key=lambda box: box[1].start + box[1].stop)
        colours = [pixels[labels == labels_in(labels, box)].mean(0) for box in boxes]
        yes = record["answer"] == "Yes"
        if record["kind"] == "larger":
            left, right = (max(box[0].stop - box[0].start, box[1].stop - box[1].start) for box in boxes)
            assert (left > right) == yes
        elif record["kind"] == "colour":
            assert (np.abs(colours[0] - colours[1]).max() < 25) == yes
        else:
            first = record["scene"][0]
            assert record["prompt"].startswith(f"Is the {first[0]} above the {record['scene'][1][0]}?")
            ys = [shape[3] for shape in record["scene"]]
            assert (ys[0] < ys[1]) == yes


def labels_in(labels: np.ndarray, box: tuple[slice, slice]) -> int:
    found = labels[box]
    return int(np.bincount(found[found > 0]).argmax())


def test_boxes_hold_what_is_asked_for(root: Path) -> None:
    checked = 0
    for record in records(root, "ground"):
        colour, kind = re.match(r"Where is the (\w+) (\w+)\?", record["prompt"]).groups()
        same = [shape for shape in record["scene"] if shape[1] == colour]
        assert [shape for shape in same if shape[0] == kind]
        if len(same) == 1:
            rows, columns = np.nonzero(of_colour(picture(root, "ground", record), colour))
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            given = [float(number) * made.SIDE for number in record["answer"].strip("[]").split(",")]
            np.testing.assert_allclose(found, given, atol=2.5)
            checked += 1
    assert checked > 20


def test_sentences_count_what_is_on_either_side(root: Path) -> None:
    for record in records(root, "scenes"):
        pixels = picture(root, "scenes", record)
        halves = {"on the left": np.s_[:, :64], "on the right": np.s_[:, 64:], "at the top": np.s_[:64]}
        halves["at the bottom"] = np.s_[64:]
        phrases = re.findall(r"(\w+) (\w+) (\w+?)e?s? ((?:on|at) the \w+)", record["answer"].lower())
        assert len(phrases) == 2
        for number, colour, _, place in phrases:
            _, n = ndimage.label(of_colour(pixels, colour)[halves[place]])
            assert n == WORDS[number]


def test_explanations_repeat_the_answer_and_tell_what_is_seen(root: Path) -> None:
    for task in ("things", "numbers", "compare", "ground"):
        for record in records(root, task):
            brief, detailed = (record["explanations"][style] for style in ("brief", "detailed"))
            for text in (brief, detailed):
                assert text.endswith(f"So the right answer is {record['answer']}.")
            asked = record["prompt"].splitlines()[0]
            assert f"The question is: {asked} " in detailed
            if "scene" in record:
                pixels = picture(root, task, record)
                named = re.findall(r"a (\w+) (\w+) at the (\w+) (\w+)", detailed)
                assert len(named) == len(record["scene"])
                for (colour, kind, row, column), shape in zip(named, record["scene"], strict=True):
                    assert [kind, colour] == shape[:2]
                    x = {"left": 0, "centre": 1, "right": 2}[column] * made.SIDE / 3
                    y = {"top": 0, "middle": 1, "bottom": 2}[row] * made.SIDE / 3
                    third = pixels[int(y) : int(y + made.SIDE / 3) + 1, int(x) : int(x + made.SIDE / 3) + 1]
                    assert of_colour(third, colour).any()
    assert "explanations" not in records(root, "compare", "test")[0]


def test_the_methods_that_are_compared_can_be_built() -> None:
    capacities = {}
    with initialize_config_module("clkit.conf", version_base="1.3"):
        for name, overrides in methods(700).items():
            config = compose("train", overrides=["experiment=home_vlm_small", "folder=runs", *overrides])
            for entry in config.strategy.values():
                instantiate(entry)
                if "capacity" in entry:
                    capacities[name] = entry.capacity
    assert capacities == {"ER 1%": 7, "ER 5%": 35, "I-LoRA 5%": 35}


def test_leaks_are_found(root: Path, tmp_path: Path) -> None:
    folder = root / "home_vlm" / "compare"

    def broken(change, match: str) -> None:
        copy = tmp_path / match.split()[0]
        (copy / "images").mkdir(parents=True)
        for file in folder.rglob("*.*"):
            (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
        test = json.loads((copy / "test.json").read_text())
        change(copy, test)
        (copy / "test.json").write_text(json.dumps(test))
        with pytest.raises(AssertionError, match=match):
            check_leaks([copy])

    def same_picture(copy: Path, test: list[dict]) -> None:
        (copy / test[0]["image"]).write_bytes((copy / "images" / "train_0000.png").read_bytes())

    def same_scene(copy: Path, test: list[dict]) -> None:
        test[0]["scene"] = json.loads((copy / "train.json").read_text())[3]["scene"]

    def always_yes(copy: Path, test: list[dict]) -> None:
        test[:] = [record for record in test if record["answer"] == "Yes"] * 12

    check_leaks([folder])
    broken(same_picture, "images/test_0000.png is also in")
    broken(same_scene, "the scene of")
    broken(always_yes, "are the same")


def test_the_seed_decides(root: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        made.write(tmp_path / str(seed), "ground", made.TASKS["ground"], 0.01, seed, Sources())
    first, other = ((tmp_path / seed / "train.json").read_text() for seed in "01")
    assert first != other
    made.write(tmp_path / "again", "ground", made.TASKS["ground"], 0.01, 0, Sources())
    for file in (tmp_path / "0").rglob("*.*"):
        assert (tmp_path / "again" / file.relative_to(tmp_path / "0")).read_bytes() == file.read_bytes()


def test_flags_that_are_one_countrys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    sources = emoji_folders(tmp_path / "emoji")
    flags = tmp_path / "flags"
    flags.mkdir()
    known = {"aa": (200, 0, 0), "bb": (200, 0, 0), "cc": (0, 200, 0), "dd": (0, 0, 200), "ee": (200, 200, 0)}
    for i, (code, colour) in enumerate(known.items()):
        stripes = np.outer((1.0, 0.4, 0.7), colour).astype(np.uint8)[:, None].repeat(320, axis=1).repeat(80, axis=0)
        Image.fromarray(stripes).save(flags / f"{code}.png")
        Image.fromarray(stripes[:64, :64]).save(tmp_path / "emoji" / "google" / "img" / "google" / "64" / f"{code}.png")
        listed.append({"name": f"{code.upper()} Flag", "short_name": f"flag-{code}", "image": f"{code}.png"})
        listed[-1] |= {"sort_order": i, "category": "Flags", "subcategory": "country-flag"}
    (tmp_path / "emoji" / "google" / "emoji.json").write_text(json.dumps(listed))
    monkeypatch.setattr(sources_of, "FLAGS", flags)
    make_vision_language.make_tasks(tmp_path, ["flags"], 0.015, 0, sources)
    found = {split: records(tmp_path, "flags", split) for split in ("train", "eval", "test")}
    assert {name: len(own) for name, own in found.items()} == {"train": 12, "eval": 3, "test": 3}
    assert {record["answer"] for own in found.values() for record in own} == {"cc", "dd", "ee"}
    for record in found["train"]:
        pixels = picture(tmp_path, "flags", record)
        shown = pixels[np.abs(pixels - pixels[0, 0]).max(2) > 80].mean(0)
        assert ((shown > 70) == (np.array(known[record["answer"]]) > 0)).all()
    monkeypatch.setattr(sources_of, "FLAGS", tmp_path / "none")
    with pytest.raises(ConfigurationError, match="apt-get install iso-flags-png-320x240"):
        make_vision_language.make_tasks(tmp_path, ["flags"], 0.015, 0, sources)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"The emoji of twitter are missing: npm pack"):
        make_vision_language.make_tasks(tmp_path, ["things"], SHARE, 0, Sources())
    with pytest.raises(ConfigurationError, match=r"share=0 is not possible"):
        make_vision_language.make_tasks(tmp_path, ["ground"], 0, 0, Sources())
    with pytest.raises(ConfigurationError, match=r"side=100 is not possible"):
        made_of.build(None, None, 100)


@pytest.mark.slow
def test_a_model_is_assembled_aligned_and_reads_the_stream(root: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "language"
    language = small_language_module(adapter=None).net
    language.save_pretrained(tiny)
    words = small_tokenizer()
    # SmolLM2's placeholder is a special token
    words.add_special_tokens({"additional_special_tokens": [words.convert_ids_to_tokens(made_of.PLACEHOLDER)]})
    words.save_pretrained(tiny)
    torch.manual_seed(1)
    lite0 = timm.create_model("tf_efficientnet_lite0")
    # the package has other names in the same order
    torch.save({f"other_{i}": part for i, part in enumerate(lite0.state_dict().values())}, tmp_path / "lite0.pth")
    expected = language.state_dict()
    for name, part in (
        made_of.build(str(tiny), str(tmp_path / "lite0.pth"), 64)[1].model.language_model.state_dict().items()
    ):
        assert torch.equal(part, expected[f"model.{name}"])
    folder = tmp_path / "model"
    make_vision_language.make_model(root, folder, str(tiny), str(tmp_path / "lite0.pth"), 64, 2)
    module = VisionLanguage(str(folder))
    model = module.net
    # the LoRA of the language model's linear layers is merged, all else of it is as it was
    for name, part in model.model.language_model.state_dict().items():
        assert torch.equal(part, expected[f"model.{name}"]) != name.endswith("proj.weight")
    for name, part in model.model.vision_tower.network.state_dict().items():
        assert torch.equal(part, lite0.state_dict()[name])
    stream = Instructions(["ground", "scenes"], processor=load_processor(str(folder)), root=root / "home_vlm")
    sample = stream[0].train[0]
    assert (sample["input_ids"] == made_of.PLACEHOLDER).sum() >= 4
    batch = stream.collate_fn([stream[1].train[i] for i in range(2)])
    stream.collate_fn.prepare(module)
    assert torch.isfinite(module(**batch).loss)
    # projected images have the size of words
    seen = model.model.get_image_features(torch.randn(2, 3, 64, 64)).pooler_output[0]
    assert 0.3 < seen.pow(2).mean().sqrt() / model.get_input_embeddings().weight.pow(2).mean().sqrt() < 3
