"""Learning-rate schedules that know the stream's steps, compared with PyTorch's and those of transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import SMALL, composed
from omegaconf import OmegaConf
from plain import QUIET, make_stream, weights

from clkit import Classifier, ConfigurationError, ResetOptimizer, StreamCheckpoint, StreamDataModule
from clkit.method.learning_rate import LearningRate, StreamLR
from clkit.models.networks import MLP
from clkit.run.checkpoint import checkpoints
from clkit.run.cli import main

ADAM = functools.partial(torch.optim.AdamW, lr=0.02)


class Rates(pl.Callback):
    """The rate of each step, as the optimizer has it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def fit(schedule, *, callbacks=(), ckpt_path=None, trainer=(), **data):
    torch.manual_seed(0)
    stream = make_stream()
    module = Classifier(MLP(stream.input_shape, stream.n_classes, hidden=(8,)), optimizer=ADAM, scheduler=schedule)
    module_data = StreamDataModule(stream, batch_size=8, **{"epochs": [1, 3, 2], **data})
    rates = Rates()
    saves = any(isinstance(callback, StreamCheckpoint) for callback in callbacks)
    settings = {**QUIET, "enable_checkpointing": saves, **dict(trainer)}
    trainer = pl.Trainer(max_epochs=module_data.total_epochs, callbacks=[rates, *callbacks], **settings)
    trainer.fit(module, datamodule=module_data, ckpt_path=ckpt_path, weights_only=True)
    return module, rates.seen, module_data.experience_steps


def of_torch(make, steps: int) -> list[float]:
    optimizer = ADAM([torch.nn.Parameter(torch.zeros(1))])
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def cosine(steps: int) -> list[float]:
    return of_torch(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps, eta_min=0.002), steps)


def one_cycle(steps: int) -> list[float]:
    # it ends at 4e-6 of the rate, as ours
    cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02, cycle_momentum=False)
    return of_torch(lambda o: cycle(o, total_steps=steps), steps)


def warmup_cosine(steps: int) -> list[float]:
    from transformers import get_cosine_schedule_with_warmup

    return of_torch(lambda o: get_cosine_schedule_with_warmup(o, 3, steps), steps)


def warmup_linear(steps: int) -> list[float]:
    from transformers import get_linear_schedule_with_warmup

    return of_torch(lambda o: get_linear_schedule_with_warmup(o, 3, steps), steps)


KNOWN = {
    "cosine": (functools.partial(LearningRate, "cosine", final=0.1), cosine),
    "one_cycle": (functools.partial(LearningRate, "one_cycle", warmup=0.3, final=4e-6), one_cycle),
    "warmup_cosine": (functools.partial(LearningRate, "cosine", warmup=3), warmup_cosine),
    "warmup_linear": (functools.partial(LearningRate, "linear", warmup=3), warmup_linear),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("span", ["stream", "experience"])
def test_rates_are_those_of_known_schedules_over_the_stream_or_each_experience(name: str, span: str) -> None:
    make, known = KNOWN[name]
    _, rates, steps = fit(make(span=span))
    expected = known(sum(steps)) if span == "stream" else [rate for length in steps for rate in known(length)]
    assert len(set(steps)) == 3
    assert rates == pytest.approx(expected, abs=1e-12)


def test_the_length_is_in_optimizer_steps_as_far_as_the_trainer_goes() -> None:
    schedule = LearningRate("linear")
    _, rates, steps = fit(schedule, trainer={"accumulate_grad_batches": 2})
    assert rates == pytest.approx([0.02 * (1 - t / sum(steps)) for t in range(sum(steps))])
    _, rates, _ = fit(schedule, epochs=1, steps=[4, 3, 9], trainer={"max_steps": 9})
    assert rates == pytest.approx([0.02 * (1 - t / 9) for t in range(9)])


def test_a_share_of_the_steps_warms_up() -> None:
    _, rates, steps = fit(LearningRate("constant", warmup=0.25), steps=[20, 20, 40], epochs=1)
    assert steps == [20, 20, 40]
    assert rates == pytest.approx([0.02 * min(t / 20, 1) for t in range(80)])


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("span", ["stream", "experience"])
def test_a_resumed_run_has_the_rates_and_bits_of_one_that_was_not_stopped(
    tmp_path: Path, span: str, reset: bool
) -> None:
    def run(folder: Path, ckpt_path: Path | None = None):
        callbacks = [StreamCheckpoint(folder, every_n_steps=7, keep=100), *([ResetOptimizer()] if reset else [])]
        return fit(LearningRate("cosine", warmup=2, span=span), callbacks=callbacks, ckpt_path=ckpt_path)  # type: ignore[arg-type]

    whole, rates, steps = run(tmp_path / "whole")
    once = warmup_over([sum(steps)] if span == "stream" else steps)
    assert rates == pytest.approx(once)
    for path in checkpoints(tmp_path / "whole"):
        resumed, rest, _ = run(tmp_path / path.stem, path)
        assert rest == rates[len(rates) - len(rest) :], path
        assert torch.equal(weights(resumed), weights(whole)), path


def warmup_over(lengths: list[int]) -> list[float]:
    from transformers import get_cosine_schedule_with_warmup

    return [
        rate
        for length in lengths
        for rate in of_torch(lambda o, n=length: get_cosine_schedule_with_warmup(o, 2, n), length)
    ]


@pytest.mark.parametrize(("span", "expected"), [("stream", [1.0, 0.9, 0.5, 0.4]), ("experience", [1.0, 0.8, 1.0, 0.8])])
def test_an_experience_that_ends_early_leaves_the_next_where_it_was_planned(span: str, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StreamLR(optimizer, LearningRate("linear").factor, [5, 5], span)  # type: ignore[arg-type]
    rates = []
    for experience in range(2):
        schedule.enter(experience)
        for _ in range(2):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates == pytest.approx(expected)


def test_it_serves_modules_of_ones_own_and_trainers_without_a_stream() -> None:
    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return LearningRate("linear").configured(self, torch.optim.SGD(self.parameters(), lr=1.0))

    rates = Rates()
    loader = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=2)
    pl.Trainer(max_epochs=2, callbacks=[rates], **QUIET).fit(Own(), loader)
    assert rates.seen == pytest.approx([1 - t / 8 for t in range(8)])
    with pytest.raises(ConfigurationError, match="attach the module to a trainer"):
        Own().configure_optimizers()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "cosin"}, "shape='cosin' is unknown; use constant, linear, cosine, one_cycle"),
        ({"span": "epoch"}, "span='epoch' is unknown; use stream, experience"),
        ({"warmup": 1.5}, "warmup=1.5 is not possible"),
        ({"warmup": -1}, "warmup=-1 is not possible"),
        ({"shape": "one_cycle", "warmup": 10}, "a share between 0 and 1"),
        ({"final": 2.0}, "final=2.0 is not possible"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LearningRate(**settings)


def test_the_groups_replace_the_models_own_and_keep_its_rate() -> None:
    def optimizer(*overrides: str) -> dict:
        return OmegaConf.to_container(composed(*overrides).model.optimizer)  # type: ignore[return-value]

    sgd = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    assert optimizer() == sgd
    adamw = optimizer("optimizer=adamw")
    assert (adamw["_target_"], adamw["lr"], adamw["weight_decay"]) == ("torch.optim.AdamW", 1e-3, 0.01)
    assert "momentum" not in adamw
    for model, rate in (("causal_lm", 2e-4), ("seq2seq_lm", 2e-4), ("encoder", 1e-4)):
        own = optimizer(f"model={model}")
        assert (own["_target_"], own["lr"], own["weight_decay"]) == ("torch.optim.AdamW", rate, 0.0)
        assert optimizer(f"model={model}", "optimizer=sgd") == {**sgd, "lr": rate}
    assert optimizer("experiment=trace_llama2_7b")["lr"] == 1e-4
    assert optimizer("optimizer=adam", "model.optimizer.lr=0.5")["lr"] == 0.5


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer=adamm", "did you mean adam or adamw?"),
        ("scheduler=cosin", "did you mean cosine?"),
        ("optimizer.lr=0.1", "those of optimizer=NAME are model.optimizer.KEY"),
        ("model.scheduler.span=experience", "add scheduler=NAME"),
    ],
)
def test_unknown_names_and_settings_are_answered_with_the_right_ones(override: str, hint: str, capsys) -> None:
    assert main(["train", override]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "warmup_cosine", "one_cycle", "wsd"])
def test_every_schedule_trains_from_the_shell(tmp_path: Path, scheduler: str) -> None:
    chosen = ["optimizer=adam", f"scheduler={scheduler}", "model.scheduler.span=experience"]
    small = [*SMALL, "data.steps=3", "trainer.enable_progress_bar=false"]
    assert main(["train", *small, *chosen, f"hydra.run.dir={tmp_path / 'run'}"]) == 0


def test_wsd_s_by_step():
    # ends 400, 600, 1200; peak 1e-3, least 1e-4, warm-up 40, re-warm-up 20, a tenth of each experience decays
    schedule = LearningRate("wsd", warmup=40, final=0.1, span="experience", rewarm=20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    lr, rates = StreamLR(optimizer, schedule.factor, [400, 200, 600], "experience"), []
    for step in range(1200):
        if step in (400, 600):
            lr.enter(1 if step == 400 else 2)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr.step()
    known = {20: 5e-4, 40: 1e-3, 360: 1e-3, 380: 5.5e-4, 399: 1.225e-4, 400: 1e-4, 410: 5.5e-4, 420: 1e-3, 580: 1e-3,
             590: 5.5e-4, 599: 1.45e-4, 600: 1e-4, 620: 1e-3, 1140: 1e-3, 1170: 5.5e-4, 1199: 1.15e-4}  # fmt: skip
    assert {step: rates[step] for step in known} == pytest.approx(known)


def test_a_jump_a_cooldown_and_a_rewarmed_cosine():
    jump = LearningRate("wsd", final=0.1, span="experience", rewarm=0)
    assert [jump.factor(t, 10, True) for t in (0, 8, 9)] == [1, 1, 1]
    cooldown = LearningRate("wsd", decay=0.5)
    assert [cooldown.factor(t, 10) for t in (0, 5, 6, 10)] == pytest.approx([1, 1, 0.8, 0])
    cosine = LearningRate("cosine", warmup=0.1, final=0.2, span="experience", rewarm=4)
    assert [cosine.factor(t, 20, True) for t in (0, 2, 4, 12, 20)] == pytest.approx([0.2, 0.6, 1, 0.6, 0.2])
    assert cosine.factor(0, 20, False) == 0
    for bad in ({"rewarm": 5}, {"rewarm": -1, "span": "experience"}, {"decay": 1.5}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            LearningRate("wsd", **bad)
