"""The protocols of LLaVA-1.5-7B on a tiny model of its architecture: records as published, from start to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command, composed, wait_for
from omegaconf import DictConfig
from vision import save_picture

import clkit
from clkit.run.checkpoint import checkpoints
from clkit.run.export import export
from clkit.run.train import run
from clkit.testing import small_processor, small_vision_language_module

PROTOCOLS = ["coin", "ucit", "mllm_dcl"]
SMALL = [
    "trainer=cpu",
    "logger=none",
    "trainer.precision=32",
    "model.dtype=float32",
    "trainer.enable_progress_bar=false",
]
SMALL += ["data.epochs=1", "data.steps=2", "data.batch_size=2", "data.num_workers=0", "model.adapter.rank=2"]
SMALL += [
    "trainer.accumulate_grad_batches=1",
    "evaluation.every=2",
    "evaluation.subset=2",
    "checkpoint.every_n_steps=3",
]
SMALL += ["callbacks.answers.max_new_tokens=3", "callbacks.answers.subset=4", "callbacks.answers.blind=2"]


def answer_of(task: str, i: int) -> str:
    return {"ScienceQA": "AB"[i % 2], "Grounding": "[0.10, 0.20, 0.40, 0.50]"}.get(task, ["red", "blue"][i % 2])


def write_records(path: Path, images: Path, task: str, *, test: bool) -> None:
    """Eight records in LLaVA's form; for the test as its evaluators have them."""
    items: list[dict[str, Any]] = []
    for i in range(8):
        save_picture(images / task / f"{path.stem}_{i}.png", (16 + 8 * i, 24), seed=i)
        question, answer = f"name the colour {i} .", answer_of(task, i)
        item: dict[str, Any] = {"image": f"{task}/{path.stem}_{i}.png"}
        if test:
            key = "answer_bbox" if task == "Grounding" else "answer"
            item |= {"question_id": i, "text": question, key: answer, "size": [16 + 8 * i, 24]}
        else:
            turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]
            if task == "VQAv2":  # several questions about an image
                turns += [{"from": "human", "value": "name it"}, {"from": "gpt", "value": answer}]
            item |= {"id": str(i), "conversations": turns}
        items.append(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data as published, by benchmark, and a tiny LLaVA."""
    root = tmp_path_factory.mktemp("protocols")
    for name in PROTOCOLS:
        scenario = composed(f"scenario={name}", f"data_root={root}").scenario
        for task, source in scenario.tasks.items():
            for split in ("train", "test"):
                path = Path(scenario.root, source[split])
                write_records(path, Path(scenario.image_root), str(task), test=split == "test")
    small_vision_language_module(adapter=None).net.save_pretrained(root / "llava")
    small_processor().save_pretrained(root / "llava")
    return root


def protocol(name: str, root: Path) -> DictConfig:
    return composed(*arguments(name, root))


def arguments(name: str, root: Path) -> list[str]:
    return [f"experiment={name}_llava15_7b", *SMALL, f"model.net={root}/llava", f"data_root={root}"]


def test_published_hyperparameters() -> None:
    # LoRA of LLaVA, CoIN and MCITlib: alpha twice the rank, the projector a rate of its own, 3% warm-up, cosine
    for name, rank, rate, epochs, most in (
        ("coin", 128, 2e-4, 1, 1024),
        ("ucit", 16, 2e-4, 1, 256),
        ("mllm_dcl", 32, 2e-5, [1, 3, 1, 2, 1], 256),
    ):
        config = composed(f"experiment={name}_llava15_7b")
        assert (config.model.adapter.rank, config.model.adapter.alpha) == (rank, 2 * rank)
        assert (config.model.optimizer.lr, config.model.projector_lr) == (rate, 2e-5)
        assert config.model.optimizer.weight_decay == 0
        assert (config.model.scheduler.shape, config.model.scheduler.warmup) == ("cosine", 0.03)
        assert config.data.epochs == epochs
        assert config.data.batch_size * config.trainer.accumulate_grad_batches == 128
        assert config.callbacks.answers.max_new_tokens == most
        assert config.model.tower == "frozen"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS[1:])
def test_it_runs_dry_from_start_to_report(name: str, files: Path, tmp_path: Path) -> None:
    config = protocol(name, files)
    run(config, tmp_path)
    found = json.loads((tmp_path / "answers.json").read_text())
    assert found["experiences"] == list(config.scenario.tasks)
    assert len(found["score"]["matrix"]) == len(found["wrong_image"]["matrix"]) == len(config.scenario.tasks)
    assert json.loads((tmp_path / "metrics.json").read_text())["complete"]
    # and others load it as the card says
    out = tmp_path / "out"
    export(tmp_path, out, merge=name == "ucit", data_root=files)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("base = ...", f"base = {str(files / 'llava')!r}").replace('"."', repr(str(out)))
    loaded: dict[str, Any] = {}
    exec(code, loaded)
    module, stream = clkit.load(tmp_path, data_root=files)
    batch = module.eval()._reader.inputs(module.net, stream.collate_fn([stream[0].test[0]]))
    batch["pixel_values"] = batch["pixel_values"].float()
    with torch.no_grad():
        expected = module.net(**batch).logits
        torch.testing.assert_close(loaded["model"].eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert loaded["processor"].image_processor is not None
    assert "wrong image" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_coin_killed_on_the_way_ends_in_the_same_bits(files: Path, tmp_path: Path) -> None:
    config, whole, killed = protocol("coin", files), tmp_path / "whole", tmp_path / "killed"
    run(config, whole)
    process = Command(["train", *arguments("coin", files), f"hydra.run.dir={killed}"], tmp_path)
    wait_for(lambda: (killed / "answers" / "after_2.jsonl").exists())
    process.kill()
    assert process.finish().returncode == -9
    assert not (killed / "answers.json").exists()
    run(config, killed)
    for name in ("history.csv", "metrics.json", "answers.csv", "answers.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    last = [torch.load(checkpoints(folder / "checkpoints")[0], weights_only=True) for folder in (whole, killed)]
    one, other = (part["state_dict"] for part in last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((killed / "answers.json").read_text())["metrics"][5] == "box_iou"
    assert (killed / "report.html").exists()
