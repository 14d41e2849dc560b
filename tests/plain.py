"""A user's own module that knows nothing of clkit, a small stream, and the plain loop they are compared with."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clkit import InMemoryDataset, Stream

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class UserModule(pl.LightningModule):
    def __init__(self, n_inputs: int = 6, n_classes: int = 6, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(n_inputs, 16), nn.ReLU(), nn.Linear(16, n_classes))
        self.lr, self.momentum = lr, momentum

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def make_stream(n_experiences: int = 3, per_class: int = 20, n_inputs: int = 6, seed: int = 0) -> Stream:
    """Two classes an experience, Gaussian clusters."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for k in range(n_experiences):
        for part in (train, test):
            y = torch.tensor([2 * k, 2 * k + 1]).repeat_interleave(per_class)
            x = torch.randn(len(y), n_inputs, generator=generator)
            x[torch.arange(len(y)), y % n_inputs] += 2
            part.append(InMemoryDataset(x, y))
    return Stream.from_datasets(train, test, n_classes=2 * n_experiences)


def make_module(seed: int = 0, **kwargs) -> UserModule:
    torch.manual_seed(seed)
    return UserModule(**kwargs)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def smallest_quadratic(matrix: np.ndarray, vector: np.ndarray, margin: float) -> np.ndarray:
    """The minimum of v'Mv/2 + q'v over v >= margin by trying every set of entries at the margin."""
    best, lowest = None, np.inf
    for at_margin in product([True, False], repeat=len(vector)):
        v, free = np.full(len(vector), margin), ~np.array(at_margin)
        if free.any():
            right = -(vector[free] + matrix[np.ix_(free, ~free)] @ v[~free])
            v[free] = np.linalg.lstsq(matrix[np.ix_(free, free)], right, rcond=None)[0]
        value = v @ matrix @ v / 2 + vector @ v
        if (v >= margin - 1e-9).all() and value < lowest:
            best, lowest = v, value
    return best
