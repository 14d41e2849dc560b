from __future__ import annotations

import functools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import composed
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from clkit import Classifier, ConfigurationError, StreamDataModule
from clkit.models.networks import MLP
from clkit.scenarios import SplitDigits
from clkit.strategies import ExperienceReplay

LOWEST = torch.finfo(torch.float32).min


class Watch(pl.Callback):
    """Notes the classifier's seen classes in every training batch."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(pl_module.seen.nonzero().flatten().tolist())


def linear(**options) -> Classifier:
    return Classifier(MLP((1, 8, 8), 10, hidden=()), **options)


def fit(module: Classifier, stream, epochs: int = 1, **options) -> pl.Trainer:
    data = StreamDataModule(stream, batch_size=64, epochs=epochs)
    options = {"enable_checkpointing": False, "logger": False, **options}
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def test_works_as_a_plain_module():
    module = linear()
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    assert torch.equal(module(x), module.net(x))
    loss = module.training_step((x, y), 0)
    torch.testing.assert_close(loss, F.cross_entropy(module.net(x), y))
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1


def test_mask_unseen_hides_nothing_without_a_stream():
    x = torch.randn(3, 1, 8, 8)
    for n_classes in (None, 10):
        module = linear(mask_unseen=True, n_classes=n_classes)
        assert torch.equal(module(x), module.net(x))


def test_task_masks_each_sample_to_its_own_classes():
    module = linear()
    fit(module, SplitDigits(5, "task-incremental"), limit_train_batches=1)
    x, task = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 2])
    logits = module(x, task)
    for row, k in enumerate(task.tolist()):
        inside = [2 * k, 2 * k + 1]
        assert torch.equal(logits[row, inside], module.net(x)[row, inside])
        assert logits[row].eq(LOWEST).sum() == 8
    assert module.task_classes.shape == (5, 10)


def test_task_without_known_tasks_is_refused():
    with pytest.raises(ConfigurationError, match="knows no task's classes"):
        linear()(torch.randn(1, 1, 8, 8), torch.tensor([0]))


def test_task_incremental_loss_is_cross_entropy_over_the_task_alone():
    module = linear()
    fit(module, SplitDigits(5, "task-incremental"), limit_train_batches=1)
    module.trainer = None
    module.zero_grad()
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([6, 7, 7, 6, 6, 7])
    loss = module.training_step((x, y, torch.full((6,), 3)), 0)
    torch.testing.assert_close(loss, F.cross_entropy(module.net(x)[:, 6:8], y - 6))
    loss.backward()
    gradient = module.net[-1].weight.grad
    assert gradient[6:8].abs().sum() > 0
    assert gradient[:6].abs().sum() == gradient[8:].abs().sum() == 0


def test_seen_classes_grow_at_the_start_of_each_experience():
    watch = Watch()
    module = linear(mask_unseen=True)
    fit(module, SplitDigits(5), epochs=2, limit_train_batches=2, callbacks=[watch])
    expected = [list(range(2 * k + 2)) for k in range(5) for _ in range(4)]
    assert watch.seen == expected


def test_mask_unseen_leaves_unseen_classes_untrained():
    module = linear(mask_unseen=True)
    before = module.net[-1].weight.clone()
    fit(module, SplitDigits(5)[:2])
    changed = (module.net[-1].weight != before).any(dim=1)
    assert changed.tolist() == [True] * 4 + [False] * 6
    assert module(torch.randn(2, 1, 8, 8))[:, 4:].eq(LOWEST).all()


def test_checkpoint_loads_with_weights_only_and_keeps_the_masks(tmp_path):
    module = linear(mask_unseen=True)
    stream = SplitDigits(5, "task-incremental")[:2]
    trainer = fit(module, stream, limit_train_batches=1, enable_checkpointing=True, default_root_dir=tmp_path)
    path = tmp_path / "end.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    copy = Classifier.load_from_checkpoint(path, net=MLP((1, 8, 8), 10, hidden=()), mask_unseen=True, weights_only=True)
    x, task = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    assert torch.equal(copy(x, task), module(x, task))
    assert copy.seen.sum() == 4


def test_learns_and_logs_what_a_plain_evaluation_gives():
    pl.seed_everything(0)
    stream = SplitDigits(1, val_fraction=0.1)
    module = linear()
    trainer = fit(module, stream, epochs=5)
    logged = dict(trainer.callback_metrics)
    module.eval()
    for part, prefix in ((stream[0].val, "val"), (stream[0].test, "test")):
        x, y = part.batch(torch.arange(len(part)))
        with torch.no_grad():
            logits = module(x)
        if prefix == "test":
            logged.update(trainer.test(module, StreamDataModule(stream, batch_size=50), verbose=False)[0])
        else:
            torch.testing.assert_close(logged["val_loss"], F.cross_entropy(logits, y))
        expected = (logits.argmax(1) == y).float().mean()
        assert float(logged[f"{prefix}_acc"]) == pytest.approx(float(expected), abs=1e-6)
        assert expected > 0.7
    assert "train_loss" in logged


LOGITS = torch.tensor([[1.0, -1.0, 2.0, 0.0]])


def four_classes(**options) -> Classifier:
    """Classes 0 and 1 are old, 2 and 3 current."""
    module = Classifier(nn.Identity(), n_classes=4, **options)
    module.current[:2] = False
    return module


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        ({}, 0.440190, [0.2369, 0.0321, -0.3561, 0.0871]),
        ({"loss": "ce_masked"}, 0.126928, [0.0, 0.0, -0.1192, 0.1192]),
        ({"loss": "bce"}, 0.820075, [0.0, 0.0, -0.1192, 0.5]),
        ({"loss": "bce", "bce_classes": "seen"}, 2.446599, [0.7311, 0.2689, -0.1192, 0.5]),
    ],
    ids=["ce", "ce_masked", "bce", "bce_seen"],
)
def test_losses_by_hand(options, value, gradient):
    logits = LOGITS.clone().requires_grad_()
    loss = four_classes(**options).training_step((logits, torch.tensor([2])), 0)
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0][0].tolist() == pytest.approx(gradient, abs=5e-5)


@pytest.mark.parametrize("loss", ["ce_masked", "bce"])
@given(shift=st.floats(-1e4, 1e4))
def test_old_logits_do_not_matter_and_get_no_gradient(loss, shift):
    module, y = four_classes(loss=loss), torch.tensor([2, 3])
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    shifted = (logits + shift * torch.tensor([1.0, 1.0, 0.0, 0.0])).requires_grad_()
    value = module._loss(shifted, y)
    assert torch.equal(value, module._loss(logits, y))
    gradient = torch.autograd.grad(value, shifted)[0]
    assert not gradient[:, :2].any()
    assert gradient[:, 2:].all()


@pytest.mark.parametrize("loss", ["ce_masked", "bce"])
def test_training_leaves_the_rows_of_other_classes_alone(loss):
    module = linear(loss=loss)
    rows = []

    class Rows(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            rows.append(module.net[-1].weight.detach().clone())

    fit(module, SplitDigits(5), callbacks=[Rows()])
    rows.append(module.net[-1].weight.detach())
    for k in range(5):
        changed = (rows[k] != rows[k + 1]).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [2 * k, 2 * k + 1]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("ce_masked", F.cross_entropy(LOGITS[:, 1:], torch.tensor([0]))),
        ("bce", F.softplus(torch.tensor([1.0, 2.0, 0.0])).sum()),
    ],
    ids=["ce_masked", "bce"],
)
def test_a_replayed_samples_own_class_takes_part(loss, expected):
    torch.testing.assert_close(four_classes(loss=loss)._loss(LOGITS, torch.tensor([1])), expected)


@pytest.mark.parametrize("loss", ["ce", "ce_masked", "bce"])
def test_replay_and_task_labels_work_with_every_loss(loss):
    for kind in ("class-incremental", "task-incremental"):
        module = linear(loss=loss, mask_unseen=True)
        fit(module, SplitDigits(5, kind)[:3], callbacks=[ExperienceReplay(50)])
        assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("loss", ["ce_masked", "bce"])
def test_without_a_stream_all_classes_take_part(loss):
    module = Classifier(nn.Identity(), loss=loss)
    y = torch.tensor([2])
    expected = (
        F.cross_entropy(LOGITS, y) if loss == "ce_masked" else F.softplus(LOGITS * torch.tensor([1, 1, -1, 1])).sum()
    )
    torch.testing.assert_close(module.training_step((LOGITS, y), 0), expected)


def test_the_loss_goes_on_with_the_current_classes_of_a_checkpoint(tmp_path):
    path = tmp_path / "end.ckpt"
    fit(linear(loss="bce"), SplitDigits(5)[:2], limit_train_batches=1).save_checkpoint(path)
    copy = Classifier.load_from_checkpoint(path, net=MLP((1, 8, 8), 10, hidden=()), weights_only=True)
    assert copy.current.nonzero().flatten().tolist() == [2, 3]


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigurationError, match="loss='mse' is unknown; use ce, ce_masked, bce"):
        linear(loss="mse")
    with pytest.raises(ConfigurationError, match="bce_classes='old' is unknown; use experience, seen"):
        linear(bce_classes="old")


def test_optimizer_gets_trainable_parameters_and_scheduler_the_optimizer():
    module = linear(
        optimizer=functools.partial(torch.optim.Adam, lr=0.5),
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1),
    )
    module.net[-1].bias.requires_grad_(False)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    assert optimizer.param_groups[0]["params"] == [module.net[-1].weight]
    assert scheduler.optimizer is optimizer
    trainer = fit(module, SplitDigits(2), limit_train_batches=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)


def test_nothing_to_train_is_refused():
    module = linear()
    module.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="No parameter of MLP has requires_grad"):
        module.configure_optimizers()


def test_network_to_build_needs_shape_and_classes():
    with pytest.raises(ConfigurationError, match="n_classes=10 and input_shape=None; give both"):
        Classifier("resnet18", n_classes=10)
    module = Classifier(MLP, n_classes=10, input_shape=(1, 8, 8))
    assert module(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_stream_with_more_classes_than_outputs_is_refused():
    with pytest.raises(ConfigurationError, match="The stream has 10 classes, but n_classes=5"):
        fit(Classifier(nn.Linear(64, 5), n_classes=5), SplitDigits(5))


LANGUAGE = ("causal_lm", "encoder", "seq2seq_lm", "vision_language")
IMAGE_MODELS = sorted(path for path in Path("conf/model").glob("[!_]*.yaml") if path.stem not in LANGUAGE)


@pytest.mark.parametrize("path", IMAGE_MODELS, ids=lambda path: path.stem)
def test_model_config_builds_a_classifier_with_the_class_defaults(path):
    assert path.read_text().startswith("# ")
    module = instantiate(composed(f"model={path.stem}").model, input_shape=(1, 8, 8), n_classes=10)
    assert module(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    optimizer = module.configure_optimizers()
    if path.stem != "pretrained_mlp":
        assert optimizer.defaults == linear().configure_optimizers().defaults
