"""fp16 with a real scaler on the CPU: a step that it leaves out is no step, and gradients are whole without it."""

from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.optim.optimizer import _global_optimizer_post_hooks

from clkit import Strategy, StreamCheckpoint, StreamDataModule
from clkit.method.gradient import loss_gradient
from clkit.strategies import CLSER, FPF, EMABalance, ExperienceReplay, InterpolatedLoRA
from clkit.testing import SmallModule, small_stream


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="pytorch_lightning")


class Module(SmallModule):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def configure_optimizers(self):
        # no momentum: that of torch's fused SGD is uninitialised memory where its first step was left out
        return torch.optim.SGD(self.parameters(), lr=0.05, fused=self.fused)


class Moves(pl.Callback):
    """Counts the batches that changed a weight, by comparing."""

    def __init__(self):
        self.count = self.batches = 0

    def on_train_batch_start(self, trainer, module, *args):
        self.before = torch.cat([p.detach().flatten() for p in module.parameters()])

    def on_train_batch_end(self, trainer, module, *args):
        after = torch.cat([p.detach().flatten() for p in module.parameters()])
        moved = not torch.equal(self.before, after)
        self.count += moved
        self.batches += 1
        assert trainer.datamodule.has_stepped == moved
        assert trainer.datamodule.steps_taken == self.count


class Counted(EMABalance):
    updates = 0

    def update(self, *args):
        self.updates += 1
        return super().update(*args)


def fit(callbacks, *, module=Module, fused=False, scale=2.0**19, checkpoint=None, **settings):
    pl.seed_everything(0, verbose=False)
    data = StreamDataModule(small_stream(2), batch_size=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, StreamCheckpoint) for callback in callbacks),
        **{"plugins": MixedPrecision("16-mixed", "cpu", scaler), **settings},
    )
    trained = module(fused)
    trainer.fit(trained, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trained, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_averages_count_the_steps_that_moved_the_weights(fused, accumulate):
    balance, slow, moves = Counted(), InterpolatedLoRA(16), Moves()
    _, trainer = fit([moves, balance, slow], fused=fused, accumulate_grad_batches=accumulate)
    assert 0 < moves.count < trainer.global_step
    assert balance.updates == slow.k == moves.count


def test_cls_er_ramps_by_the_steps_that_happened():
    strategy = CLSER(16, plastic_rate=1.0, stable_rate=1.0, plastic_decay=0.0, stable_decay=0.999)
    seen = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append([module.net[1].weight.detach().clone(), trainer.datamodule.has_stepped])

    fit([strategy, Reads()])
    pl.seed_everything(0, verbose=False)
    average, n = Module(False).net[1].weight.detach().clone(), 0
    for weight, stepped in seen:
        if stepped:
            n += 1
            average.lerp_(weight, 1 - min(0.999, 1 - 1 / (n + 1)))
    assert 0 < n < len(seen)
    torch.testing.assert_close(strategy.averages["stable"]["net.1.weight"], average)


def test_without_a_scaler_every_step_counts_and_those_of_finetuning_phases_do_not():
    moves = Moves()
    _, trainer = fit([moves, ExperienceReplay(16), FPF(steps=3, when="experience")], plugins=[])
    assert trainer.datamodule.steps_taken == trainer.global_step == moves.batches


class Foreign:
    """An optimizer that is none of PyTorch's, as DeepSpeed's are."""

    def __init__(self, optimizer):
        self.inner = optimizer

    def __getattr__(self, name):
        return getattr(self.inner, name)


class WithForeign(Module):
    def configure_optimizers(self):
        return Foreign(super().configure_optimizers())


def test_an_optimizer_that_cannot_be_watched_is_believed():
    slow = InterpolatedLoRA(16)
    _, trainer = fit([Moves(), slow], module=WithForeign, plugins=[], accumulate_grad_batches=2)
    assert trainer.datamodule.steps_taken == trainer.global_step == slow.k > 0


def test_a_resumed_run_goes_on_counting(tmp_path):
    slow = InterpolatedLoRA(16)
    _, whole = fit([slow, StreamCheckpoint(tmp_path, every_n_steps=4, keep=9)])
    again = InterpolatedLoRA(16)
    _, resumed = fit([again], checkpoint=tmp_path / "step=000000004.ckpt")
    assert resumed.datamodule.steps_taken == whole.datamodule.steps_taken
    assert again.k == slow.k < whole.global_step


class Gradients(Strategy):
    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))


def test_optimizers_that_unscale_within_their_step_show_strategies_the_same_gradients():
    one, other = Gradients(), Gradients()
    ends = [fit([own], fused=fused, scale=2.0**8)[0] for own, fused in ((one, False), (other, True))]
    torch.testing.assert_close(torch.stack(one.found), torch.stack(other.found), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*(list(end.parameters()) for end in ends), rtol=1e-3, atol=1e-5)


class Faint(Module):
    """Its gradients are below what fp16 can hold."""

    def training_step(self, batch, batch_idx):
        return 1e-8 * super().training_step(batch, batch_idx)


def test_a_backward_of_ones_own_keeps_gradients_that_vanish_in_fp16():
    found = {}

    class Measures(Strategy):
        def __init__(self, name):
            self.name = name

        def on_before_optimizer_step(self, trainer, module, optimizer):
            batch = small_stream(1)[0].train.batch(torch.arange(8))
            found.setdefault(self.name, loss_gradient(trainer, module, list(module.parameters()), batch))

    fit([Measures("fp16")], module=Faint)
    fit([Measures("full")], module=Faint, plugins=[])
    assert found["full"].count_nonzero() > 100
    torch.testing.assert_close(found["fp16"], found["full"], rtol=1e-3, atol=0)


def test_nothing_counts_after_a_fit_however_it_ends():
    class Stops(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    fit([])
    assert not _global_optimizer_post_hooks
    with pytest.raises(RuntimeError, match="stop"):
        fit([Stops()])
    assert not _global_optimizer_post_hooks
