from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_stream

from clkit import ConfigurationError, Experience, Stream, StreamDataModule
from clkit.language.dataset import Pad
from clkit.strategies import ExperienceReplay


class Sizes(UserModule):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((len(batch[0]), batch[1].max().item() >= 2 and batch[1].min().item() < 2))
        return super().training_step(batch, batch_idx)


def fit(strategy):
    module = Sizes()
    data = StreamDataModule(make_stream(2), batch_size=8)
    pl.Trainer(max_epochs=2, callbacks=[strategy], **QUIET).fit(module, datamodule=data)
    return module.seen


def test_replay_starts_at_the_second_step_with_as_many_samples_as_the_batch():
    seen = fit(ExperienceReplay(100))
    assert [size for size, _ in seen] == [8] + [16] * 9
    assert [mixed for _, mixed in seen][:5] == [False] * 5
    assert all(mixed for _, mixed in seen[5:])


def test_the_number_of_replayed_samples_can_be_set_and_is_bounded_by_the_memory():
    assert [size for size, _ in fit(ExperienceReplay(100, batch_size=3))] == [8] + [11] * 9
    assert [size for size, _ in fit(ExperienceReplay(5, batch_size=30))] == [8] + [13] * 9


@pytest.mark.parametrize("scale", [True, False])
def test_the_first_task_is_scaled_by_alpha_only_if_asked(scale):
    losses = []

    class Probe(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses.append((loss.item(), trainer.callback_metrics["train_loss"].item()))

    torch.manual_seed(0)
    data = StreamDataModule(make_stream(2), batch_size=8)
    strategy = ExperienceReplay(10, alpha=0.25, scale_first_task=scale)
    trainer = pl.Trainer(max_epochs=2, callbacks=[strategy, Probe()], **QUIET)
    trainer.fit(Sizes(), datamodule=data)
    total, own = losses[0]
    assert total == pytest.approx(own * (0.25 if scale else 1.0))


class TokenMean(pl.LightningModule):
    """Its loss is the mean of a weight over labelled tokens, as that of language models is of the tokens' losses."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.gradients = []

    def training_step(self, batch, batch_idx):
        labels = batch["labels"]
        return self.weight[labels[labels != -100]].mean()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.weight.grad.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("settings", "new"),
    [({}, 2 / (2 + 6)), ({"weigh": "tokens"}, 2 / (2 + 6 * 50)), ({"alpha": 0.4, "scale_first_task": False}, 0.4)],
)
def test_replayed_texts_weigh_by_their_number_and_not_by_their_length(settings, new):
    answers = [[1] * 50] * 6, [[2]] * 2
    tasks = [[{"input_ids": torch.tensor(a), "labels": torch.tensor(a)} for a in task] for task in answers]
    experiences = [Experience(k, f"t{k}", data, data) for k, data in enumerate(tasks)]
    stream = Stream(experiences, name="texts", kind="instruction", collate_fn=Pad())
    module, data = TokenMean(), StreamDataModule(stream, batch_size=6)
    strategy = ExperienceReplay(6, batch_size=6, **settings)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[strategy], **QUIET).fit(module, datamodule=data)
    assert module.gradients[0] == pytest.approx([0, 1, 0, 0])
    assert module.gradients[1] == pytest.approx([0, 1 - new, new, 0], rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"weigh": "length"}, {"capacity": -1}, {"alpha": 0.0}, {"alpha": 1.5}, {"batch_size": 0}]
)
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        ExperienceReplay(**settings)


def test_an_unknown_buffer_is_refused():
    with pytest.raises(ConfigurationError, match="use reservoir, class_balanced"):
        ExperienceReplay(buffer="fifo")


class Manual(UserModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_appended_samples_train_a_module_that_optimizes_manually_too():
    weights = []
    for kind in (UserModule, Manual):
        torch.manual_seed(0)
        module, data = kind(), StreamDataModule(make_stream(3), batch_size=8)
        trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[ExperienceReplay(16)], **QUIET)
        trainer.fit(module, datamodule=data)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
    trainer = pl.Trainer(max_epochs=3, callbacks=[ExperienceReplay(16, alpha=0.5)], **QUIET)
    with pytest.raises(ConfigurationError, match="optimizes manually"):
        trainer.fit(Manual(), datamodule=StreamDataModule(make_stream(3), batch_size=8))
