"""Train a network of conf/model/pretrained_*.yaml on some classes of a dataset, and save its weights.

python tools/pretrain.py [--net tiny_vit] [--dataset fashion_mnist] [--classes 0 1 2 3] [--steps 1500]
    [--data-root data] [--output pretrained.pt]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch

from clkit import Classifier, StreamDataModule
from clkit.models.networks import MLP, tiny_vit
from clkit.scenarios import Split

NETWORKS: dict[str, Callable[..., torch.nn.Module]] = {
    # 4x4 patches an image
    "tiny_vit": lambda shape: tiny_vit(shape, 10, patch_size=shape[-1] // 4),
    "mlp": lambda shape: MLP(shape, 10),
}


def pretrain(
    data_root: str,
    output: Path,
    classes: list[int],
    steps: int,
    dataset: str = "fashion_mnist",
    net: str = "tiny_vit",
) -> float:
    """Train, save, and return the test accuracy."""
    stream = Split(dataset, 1, class_order=classes, data_root=data_root)
    data = StreamDataModule(stream, batch_size=64, steps=steps)
    torch.manual_seed(0)
    network = NETWORKS[net](stream.input_shape)
    module = Classifier(network, 10, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    (result,) = trainer.test(module, datamodule=data, verbose=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.net.state_dict(), output)
    return result["test_acc"]


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETWORKS, default="tiny_vit")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--output", type=Path, default=Path("pretrained.pt"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    accuracy = pretrain(args.data_root, args.output, args.classes, args.steps, args.dataset, args.net)
    print(f"{args.output}: {100 * accuracy:.1f}% on classes {args.classes}")


if __name__ == "__main__":
    main()
