"""Images in folders of classes as streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL
from PIL import Image

from clkit import ConfigurationError, InMemoryDataset
from clkit.data.datasets import in_memory
from clkit.report.runs import Run
from clkit.run.cli import main
from clkit.run.trained import evaluate
from clkit.scenarios import ImageFolder

CLASSES = ("ant", "bee", "cat", "dog")
SIZES = {"train": 6, "test": 3, "val": 2}


def picture(path: Path, colour: int, height: int = 10, width: int = 14) -> None:
    """A picture whose left and right fifth would be cut away, with another colour there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), colour, dtype=np.uint8)
    pixels[:, :2] = pixels[:, -2:] = 255
    Image.fromarray(pixels).save(path)


def write(root: Path, classes=CLASSES, splits=("train", "test")) -> Path:
    for split in splits:
        for label in classes:
            for n in range(SIZES[split]):
                picture(root / split / label / f"{n}.png", 20 * (1 + CLASSES.index(label)) + n)
    return root


def test_classes_are_split_into_experiences_and_decoded_when_read(tmp_path: Path) -> None:
    stream = ImageFolder(write(tmp_path / "pets"), n_experiences=2, size=10)
    assert (stream.name, stream.n_classes, stream.input_shape) == ("pets", 4, (3, 10, 10))
    assert [(e.name, e.classes, len(e.train), len(e.test)) for e in stream] == [
        ("ant bee", (0, 1), 12, 6),
        ("cat dog", (2, 3), 12, 6),
    ]
    assert stream[0].val is None
    x, y = stream[1].train[6]
    assert (y, y.dtype) == (3, torch.int64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # the white margins are cut away, all else has the colour of the first dog
    assert torch.allclose(x, ((80 / 255 - mean) / std)[:, None, None].expand(3, 10, 10), atol=1e-5)
    held = in_memory(stream[1].train, torch.tensor([6, 0]))
    assert isinstance(held, InMemoryDataset)
    assert held.x.dtype == torch.uint8
    assert torch.equal(held[0][0], x)


def test_an_order_by_name_tasks_and_domains(tmp_path: Path) -> None:
    root = write(tmp_path)
    stream = ImageFolder(root, 2, "task-incremental", size=8, class_order=["dog", "ant", "cat", "bee"])
    assert [e.classes for e in stream] == [(0, 3), (1, 2)]
    assert [int(part) for part in stream[1].test[5][1:]] == [2, 1]  # the last cat, in the second task
    domains = ImageFolder(root, 2, "domain-incremental", size=8)
    assert [e.classes for e in domains] == [(0, 1), (0, 1)]
    assert domains.n_classes == 2
    with pytest.raises(ConfigurationError, match="did you mean bee"):
        ImageFolder(root, 2, class_order=["dog", "beee"])


def test_validation_data_have_a_folder_or_are_held_out(tmp_path: Path) -> None:
    held = ImageFolder(write(tmp_path / "a"), 2, size=8, val_fraction=1 / 3)
    assert [(len(e.train), len(e.val)) for e in held] == [(8, 4), (8, 4)]
    assert not {p.name for p in held[0].val.paths} & {p.name for p in held[0].train.paths if p.parent.name == "ant"} - {
        p.name for p in held[0].val.paths if p.parent.name == "bee"
    }
    own = ImageFolder(write(tmp_path / "b", splits=SIZES), 2, size=8, val_fraction=0.5)
    assert [(len(e.train), len(e.val)) for e in own] == [(12, 4), (12, 4)]


def test_a_folder_for_each_experience(tmp_path: Path) -> None:
    write(tmp_path / "2020", ("ant", "bee"))
    write(tmp_path / "2021", ("bee", "dog"))
    (tmp_path / ".cache").mkdir()
    stream = ImageFolder(tmp_path, size=8)
    assert [(e.name, e.classes) for e in stream] == [("2020", (0, 1)), ("2021", (1, 2))]
    assert stream.n_classes == 3
    assert len(stream[1].train) == 12


def test_other_files_are_another_stream(tmp_path: Path) -> None:
    first = ImageFolder(write(tmp_path), 2, size=8).fingerprint()
    assert ImageFolder(tmp_path, 2, size=8).fingerprint() == first
    picture(tmp_path / "train" / "ant" / "0.png", 99, width=40)
    assert ImageFolder(tmp_path, 2, size=8).fingerprint() != first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"is not there. Expected are .*train/CLASS/IMAGE"),
        (lambda root: picture(root / "ant" / "0.png", 1), r"but ant. Expected are"),
        (lambda root: write(root, splits=["train"]), r"test is not there. Expected are"),
        (lambda root: [write(root), (root / "test" / "ants").mkdir()], None),
        (lambda root: [write(root), picture(root / "test" / "ants" / "0.png", 1)], "did you mean ant"),
        (lambda root: [write(root), picture(root / "extra" / "ants" / "0.png", 1)], None),
    ],
)
def test_another_layout_is_answered_with_the_expected_one(tmp_path: Path, make, message: str | None) -> None:
    make(tmp_path / "images")
    if message is None:
        assert len(ImageFolder(tmp_path / "images", 2)) == 2
        return
    with pytest.raises(ConfigurationError, match=message):
        ImageFolder(tmp_path / "images", 2)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train" / "ant" / "0.png").write_text("no picture")
    with pytest.raises(ConfigurationError, match=r"train/ant/0.png cannot be read as an image"):
        ImageFolder(tmp_path, 2, size=8)[0].train[0]


def test_it_trains_from_the_shell_augmented_and_evaluated_as_stored(tmp_path: Path) -> None:
    write(tmp_path / "images")
    small = [item for item in SMALL if "n_experiences" not in item]
    chosen = ["scenario=image_folder", f"data_root={tmp_path}", "scenario.n_experiences=2", "scenario.size=8"]
    more = ["scenario.augment=standard", "trainer.enable_progress_bar=false", "data.batch_size=4"]
    for limit in (0, 10**9):
        folder = tmp_path / str(limit)
        command = [*small, *chosen, *more, f"evaluation.subset_limit={limit}", f"hydra.run.dir={folder}"]
        assert main(["train", *command]) == 0
    assert (tmp_path / "0" / "history.csv").read_text() == (tmp_path / str(10**9) / "history.csv").read_text()
    assert Run.read(tmp_path / "0").summary["complete"]
    assert len(evaluate(tmp_path / "0").scores) == 2
