"""Speed on a model of texts and images with LoRA: training with a frozen tower run once, generation, reading records.

    python tools/bench_vlm.py [--model FOLDER] [--steps 12] [--records 100000] [--clock cpu] [--device cuda]
        [--packing 300]

Without ``--model`` it is a LLaVA with random weights: a CLIP tower of 4 layers, 64 tokens an image, a language model of
4 layers with 8192 words, both of width 256. ``--model`` takes the folder of a LLaVA with its processor, as
``from_pretrained`` reads it. Images are PNG files of 256 pixels, texts have about 45 tokens, batches 8 samples. The
three loops take turns after every step, so that another program's load falls on all of them; ratios are of medians
over steps.

- ``once / plain``: time of clkit's training step with features in memory, over a plain loop of transformers and peft
  that reads the same images and runs the tower each time.
- ``once / once``: over the same plain loop with the projector's inputs computed before.
- ``generation``: 64 answers of 8 tokens, 32 at a time, over one by one.
- ``records``: seconds to open a task of so many records, each with an image of its own path.
- ``memory``: the process's peak, after training and generation, and after opening the records.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clkit import Experience, Stream, StreamDataModule
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import generate
from clkit.language.images import ImageFile, ImageTable
from clkit.language.models import VisionLanguage, load_processor
from clkit.language.records import Record
from clkit.method.adapters import lora
from clkit.scenarios import Instructions
from clkit.testing import small_tokenizer

BATCH, PIXELS, INODES = 8, 256, 20
WIDTH = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
WORDS = ("red", "green", "blue", "one", "two")


def small() -> tuple[Any, Any]:
    """Return the processor and the configuration of a small LLaVA."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})
    settings = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 128, "patch_size": 16, **WIDTH},
        text_config={
            "model_type": "llama",
            "vocab_size": 8192,
            "eos_token_id": 2,
            "pad_token_id": 2,
            **WIDTH,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return transformers.LlavaProcessor(images, tokenizer, **settings), config


def pictures(folder: Path, n: int) -> list[Path]:
    """Write images of noise in coarse tiles."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        tiles = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        paths.append(folder / f"{i}.png")
        tiles.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR).save(paths[-1])
    return paths


def records(paths: list[Path]) -> list[Record]:
    rng = random.Random(0)
    found = []
    for path in paths:
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(25, 55)))
        image = ImageFile(path.name, str(path), (PIXELS, PIXELS))
        found.append(Record((("user", prompt),), "yes", images=(image,)))
    return found


class Plain:
    """A loop of transformers and peft.

    Args:
        module: Its ``net`` is trained.
        data: The samples.
        once: Whether the projector's inputs are computed before.
    """

    def __init__(self, module: VisionLanguage, data: InstructionDataset, once: bool) -> None:
        self.net, self.optimizer, self.data = module.net.train(), module.configure_optimizers(), data
        self.device = module.device
        base = self.net.get_base_model()
        base.model.vision_tower.eval()
        self.projector, self.processor = base.model.multi_modal_projector, data.images.processor  # type: ignore[union-attr]
        self.texts = [{key: sample[key] for key in ("input_ids", "labels")} for sample in data]  # type: ignore[attr-defined]
        self.inputs: list[torch.Tensor] = []
        if once:
            hook = self.projector.register_forward_pre_hook(lambda part, args: self.inputs.append(args[0].cpu()))
            with torch.no_grad():
                for i in range(len(data)):
                    base.get_image_features(pixel_values=self.pixels([i]))
            hook.remove()
        self.collate = Pad()

    def pixels(self, rows: list[int]) -> torch.Tensor:
        images = [Image.open(self.data.records[i].images[0].path).convert("RGB") for i in rows]  # type: ignore[attr-defined]
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(self.device)

    def step(self, rows: list[int]) -> None:
        texts = self.collate([self.texts[i] for i in rows])
        batch: dict[str, Any] = {name: part.to(self.device) for name, part in texts.items()}
        if self.inputs:
            features = list(self.projector(torch.cat([self.inputs[i] for i in rows]).to(self.device)))
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        else:
            batch["pixel_values"] = self.pixels(rows)
        self.optimizer.zero_grad()
        self.net(**batch).loss.backward()
        self.optimizer.step()


class InTurn(pl.Callback):
    """Lets plain loops make the step that clkit has just made, and times all, once every image has been seen."""

    def __init__(self, loops: dict[str, Plain], first: int, clock: Callable[[], float]) -> None:
        self.loops, self.first, self.clock = loops, first, clock
        self.seconds: dict[str, list[float]] = {name: [] for name in ("clkit", *loops)}
        self._since = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        own = self.clock() - self._since
        if trainer.global_step > self.first:
            self.seconds["clkit"].append(own)
            rows = batch["images"].numbers[:, 0].tolist()
            for name, loop in self.loops.items():
                start = self.clock()
                loop.step(rows)
                self.seconds[name].append(self.clock() - start)
        self._since = self.clock()


def train(module: VisionLanguage, data: InstructionDataset, steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of a step of clkit and of the plain loops, on the module's device."""
    device = module.device
    loops = {name: Plain(copy.deepcopy(module), data, name == "plain, once") for name in ("plain", "plain, once")}
    for loop in loops.values():
        loop.step(list(range(BATCH)))
    stream = Stream(
        [Experience(0, "E0", data, data)], name="bench", kind="instruction", collate_fn=Pad("right", data.images)
    )
    turns = InTurn(loops, len(data) // BATCH, clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=[turns],
            default_root_dir=folder,
            accelerator=device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=StreamDataModule(stream, batch_size=BATCH, steps=len(data) // BATCH + steps))
    module.to(device)  # which Lightning takes it off
    return {name: statistics.median(values) for name, values in turns.seconds.items()}


def opening(folder: Path, sources: list[Path], processor: Any, n: int, clock: Callable[[], float]) -> float:
    """Return the seconds that a stream of ``n`` records takes to be made."""
    (folder / "many" / "images").mkdir(parents=True)
    with (folder / "many" / "train.jsonl").open("w") as file:
        for i in range(n):
            # other names of a few files: a million files are no subject here
            os.link(sources[i % INODES], folder / "many" / "images" / f"{i}.png")
            record = {"image": f"images/{i}.png", "prompt": " ".join(WORDS[i % 5 :]), "answer": "yes"}
            file.write(json.dumps(record) + "\n")
    (folder / "many" / "test.jsonl").write_text(json.dumps(record) + "\n")
    start = clock()
    stream = Instructions(["many"], root=folder, processor=processor)
    seconds = clock() - start
    assert len(stream[0].train) == n  # type: ignore[arg-type]
    return seconds


def peak() -> float:
    """Return the most memory that the process has had, in MB, without a GPU's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def at_rest(device: torch.device, clock: Callable[[], float]) -> Callable[[], float]:
    """Return a clock that waits for what a GPU was given."""

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read if device.type == "cuda" else clock


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a LLaVA and its processor; a small one by default")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=64, help="different ones, each a sample")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where other programs run")
    parser.add_argument("--packing", type=int, help="most tokens of a row of several samples in clkit's step")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    clock = at_rest(args.device, time.perf_counter if args.clock == "wall" else time.process_time)
    torch.manual_seed(0)
    processor, net = small() if args.model is None else (load_processor(args.model), args.model)
    adapter = lora(8, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM")
    module = VisionLanguage(net, adapter=adapter, features="memory", packing=args.packing).to(args.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = pictures(folder, max(args.images, args.answers, INODES))
        data = InstructionDataset(records(paths[: args.images]), processor, images=ImageTable(processor))
        seconds = train(module, data, args.steps, clock)
        asked = InstructionDataset(records(paths[: args.answers]), processor, images=data.images)
        questions = [asked.question(i) for i in range(args.answers)]
        limits: dict[str, Any] = {"tokenizer": asked.tokenizer, "max_new_tokens": 8, "images": asked.images}
        module.eval()
        start = clock()
        generate(module, questions, batch_size=32, **limits)
        together = clock() - start
        start = clock()
        for question in questions:
            generate(module, [question], **limits)
        alone = clock() - start
        trained = peak()
        opened = opening(folder, paths, processor, args.records, clock)
    table = Table("what", "found", "of", "goal")
    base, plain, once = seconds["clkit"], seconds["plain"], seconds["plain, once"]
    step = f"{base:.3f} s a step of {BATCH}; plain {plain:.3f} s"
    table.add_row("once / plain", f"{base / plain:.2f}", step, "at most 0.75")
    table.add_row("once / once", f"{base / once:.2f}", f"plain with features {once:.3f} s", "at most 1.05")
    table.add_row(
        "generation",
        f"{alone / together:.2f}",
        f"{args.answers} answers in {together:.2f} s, 32 at a time",
        "at least 4",
    )
    table.add_row("records", f"{opened:.1f} s", f"{args.records:,} records with images opened", "seconds")
    table.add_row("memory", f"{trained:,.0f} MB", f"peak, three models; {peak():,.0f} MB with the records", "")
    Console().print(table)


if __name__ == "__main__":
    main()
