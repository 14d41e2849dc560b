"""Started by torchrun as two processes: train one method with half the batch size on each and save the weights."""

from __future__ import annotations

import sys

import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights
from test_training import METHODS

from clkit import StreamDataModule

if __name__ == "__main__":
    method, output = sys.argv[1:]
    torch.set_num_threads(1)
    data = StreamDataModule(make_stream(per_class=12), batch_size=4, epochs=2)
    _, strategies = METHODS[method]
    module = make_module()
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=strategies(), devices=2, strategy="ddp", **QUIET)
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        torch.save(weights(module), output)
