from __future__ import annotations

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import QUIET, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.strategies import EMABalance, ExperienceReplay, PerTask
from clkit.strategies.ema_balance import PRESETS


def moved(preset, average, before, after, earlier, gradient):
    """The average after one step of one tensor, all given by hand."""
    ema = EMABalance(preset)
    ema.average = {"w": torch.tensor(average)}
    ema.weights = {"w": torch.tensor(before)}
    ema.gradient = {} if earlier is None else {"w": torch.tensor(earlier)}
    live, fell_back = ema.update({"w": torch.tensor(after)}, {"w": torch.tensor(gradient)})
    return ema.average["w"].tolist(), float(live), bool(fell_back)


@pytest.mark.parametrize(
    ("preset", "gradient", "expected", "live"),
    [
        ("reference", [0.5, -0.5], [1.5, -0.5], 0.125),
        ("paper", [0.5, -0.5], [4.75, 2.75], 1 - 0.0625),
        ("fixed", [0.5, -0.5], [1.04, -0.96], 0.01),
        ("reference", [2.5, 1.5], [1.04, -0.96], 0.01),  # the gradient before: no difference, so the fallback
        ("paper", [2.5, 1.5], [1.04, -0.96], 0.01),
    ],
)
def test_worked_example(preset, gradient, expected, live):
    average, weight, _ = moved(preset, [1.0, -1.0], [4.5, 2.5], [5.0, 3.0], [2.5, 1.5], gradient)
    assert average == pytest.approx(expected, rel=1e-6)
    assert weight == pytest.approx(live)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("reference", [[0.02, 0.02], [2.6733333, 0.0066667], [3.6113033, 0.5686967]]),
        ("paper", [[0.02, 0.02], [0.0598, 0.0198], [3.7500379, 1.2499621]]),
    ],
)
def test_worked_chain(preset, expected):
    ema = EMABalance(preset)
    ema._begin({"w": torch.zeros(2)})
    live = [[2.0, 2.0], [4.0, 0.0], [6.0, 2.0]]
    gradients = [[1.0, 1.0], [-1.0, 2.0], [3.0, -2.0]]
    for weight, gradient, average in zip(live, gradients, expected, strict=True):
        ema.update({"w": torch.tensor(weight)}, {"w": torch.tensor(gradient)})
        assert ema.average["w"].tolist() == pytest.approx(average, rel=1e-5)


def test_worked_chain_of_fisher():
    ema = EMABalance("fisher")
    ema._begin({"w": torch.zeros(2)})
    # squares [1, 1], [1, 4], [9, 4] sum to [1, 1], [2, 5], [11, 9]; kept are 0, then 1/4 and 1/25, then 4/121 and 25/81
    steps = [
        ([2.0, 2.0], [1.0, 1.0], [2.0, 2.0], 1.0),
        ([4.0, 0.0], [-1.0, 2.0], [3.5, 0.08], (3 / 4 + 24 / 25) / 2),
        ([6.0, 2.0], [3.0, -2.0], [716 / 121, 114 / 81], (117 / 121 + 56 / 81) / 2),
    ]
    for weight, gradient, average, live in steps:
        shares, _ = ema.update({"w": torch.tensor(weight)}, {"w": torch.tensor(gradient)})
        assert ema.average["w"].tolist() == pytest.approx(average, rel=1e-6)
        assert shares.tolist() == pytest.approx([live])


def after_steps(weights, gradients, preset="fisher"):
    """The average of one tensor after these steps, from weights that start at 0."""
    ema = EMABalance(preset)
    ema._begin({"w": torch.zeros_like(weights[0])})
    for weight, gradient in zip(weights, gradients, strict=True):
        shares, _ = ema.update({"w": weight}, {"w": gradient})
    return ema.average["w"], shares


def test_mean_is_the_mean_of_all_live_weights():
    live, gradients = torch.randn(2, 5, 3)
    average, shares = after_steps(live, gradients, "mean")
    torch.testing.assert_close(average, live.mean(dim=0))
    assert shares.tolist() == pytest.approx([1 / 5])


@settings(max_examples=30)
@given(st.integers(1, 50), st.floats(-6, 6), st.integers(0, 2**31))
def test_fisher_depends_neither_on_the_size_of_a_tensor_nor_on_the_scale_of_the_loss(times, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    weights, gradients = torch.randn(2, 4, 3, 5, generator=rng)
    average, shares = after_steps(weights, gradients)
    tiled, of_tiled = after_steps(weights.repeat(1, times, 1), gradients.repeat(1, times, 1))
    torch.testing.assert_close(tiled, average.repeat(times, 1))
    torch.testing.assert_close(of_tiled, shares)
    torch.testing.assert_close(after_steps(weights, 10**scale * gradients)[0], average)


def test_fisher_follows_what_no_gradient_has_reached_by_the_decay():
    average, _ = after_steps(torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
    assert average.tolist() == pytest.approx([0.02, 2.0])


def test_fisher_knows_nothing_of_new_rows():
    ema = EMABalance("fisher")
    ema.average, ema.information = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0])}
    ema.update({"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert ema.average["w"].tolist() == [1 - 9 / 16, 1.0]


numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


@given(st.sampled_from(PRESETS), numbers, numbers, numbers, st.none() | numbers, numbers)
def test_the_average_stays_between_itself_and_the_live_weights(preset, average, before, after, earlier, gradient):
    result, live, _ = moved(preset, average, before, after, earlier, gradient)
    assert 0 < live < 1 or (preset in ("fisher", "mean") and live == 1)
    for new, old, weight in zip(result, average, after, strict=True):
        slack = 1e-4 * (1 + abs(old) + abs(weight))
        assert min(old, weight) - slack <= new <= max(old, weight) + slack


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gradient_that_is_not_finite_changes_nothing(preset, bad):
    result, live, _ = moved(preset, [1.0, -1.0], [4.5, 2.5], [5.0, 3.0], [2.5, 1.5], [bad, 0.0])
    assert result == [1.0, -1.0]
    assert live == 0


def test_a_gradient_whose_square_is_not_finite_leaves_fisher_as_it_is():
    average, _ = after_steps(torch.tensor([[2.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 1.0], [1e30, 0.0]]))
    assert average.tolist() == [2.0, 2.0]


def test_equal_weights_leave_the_average_as_it_is():
    assert moved("reference", [1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [1.0, 1.0], [2.0, 3.0])[0] == [1.0, 2.0]


def fit(callbacks, module=None, ckpt_path=None, epochs=2, **trainer_settings):
    data = StreamDataModule(make_stream(), batch_size=8, epochs=epochs)
    module = make_module() if module is None else module
    settings = {**QUIET, "max_epochs": data.total_epochs, **trainer_settings}
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


class ByHand(pl.Callback):
    """The reference preset, tensor by tensor in a plain loop, on weights and gradients as they come by."""

    def __init__(self):
        self.chain = []

    def on_experience_start(self, trainer, module, experience):
        self.average = [p.detach().clone() for p in module.parameters()]
        self.gradient = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parameters = list(pl_module.parameters())
        for k, p in enumerate(parameters):
            live = 0.01
            if self.gradient is not None:
                a = (p.detach() - self.average[k]).abs().sum().item()
                c = (p.grad - self.gradient[k]).abs().sum().item()
                value = 2 * (1 + p.grad.abs().sum().item()) / (a * c) if a * c > 0 else float("inf")
                live = value if 0 < value < 1 else live
            self.average[k] = (1 - live) * self.average[k] + live * p.detach()
        self.gradient = [p.grad.clone() for p in parameters]
        self.chain.append(torch.cat([a.flatten() for a in self.average]))


class Averages(pl.Callback):
    def __init__(self, ema):
        self.ema, self.chain = ema, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.chain.append(torch.cat([a.flatten() for a in self.ema.average.values()]))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_chain_over_a_stream_equals_a_plain_loop(clip):
    ema, by_hand = EMABalance(), ByHand()
    averages = Averages(ema)
    module = fit([by_hand, ema, averages], gradient_clip_val=clip)
    torch.testing.assert_close(torch.stack(averages.chain), torch.stack(by_hand.chain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(module), by_hand.chain[-1], rtol=1e-4, atol=1e-5)


def test_fisher_over_a_stream_is_one_weighted_mean_of_all_live_weights():
    squares, live, ends = [], [], []

    class Steps(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            live.append(weights(pl_module))
            squares.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]) ** 2)

        def on_experience_end(self, trainer, module, experience):
            ends.append((len(live), weights(module)))

    fit([EMABalance("fisher"), Steps()])
    sums = torch.cumsum(torch.stack(squares).double(), 0)
    worth = torch.diff(sums**2, dim=0, prepend=torch.zeros(1, sums.shape[1]))
    reached = sums > 0
    for steps, average in ends:
        mean = (worth * torch.stack(live))[:steps].sum(0) / sums[steps - 1] ** 2
        known = reached[0]
        torch.testing.assert_close(average[known].double(), mean[known], rtol=1e-4, atol=1e-5)
    assert known.float().mean() > 0.5


@pytest.mark.parametrize("preset", ["fisher", "mean"])
def test_fisher_and_what_starts_weights_anew_are_refused(preset):
    with pytest.raises(ConfigurationError, match="compares weights with those of earlier ones"):
        fit([PerTask(), EMABalance(preset)])


def test_the_experience_goes_on_from_its_average_and_its_state_is_dropped():
    seen = {}

    class Ends(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            seen[experience.index] = (dict(ema.average), weights(module))

        def on_experience_start(self, trainer, module, experience):
            seen[f"start {experience.index}"] = weights(module)

    ema = EMABalance()
    averages = Averages(ema)
    fit([ema, averages, Ends()])
    for k in range(3):
        state, after = seen[k]
        assert state == {}
        assert torch.equal(after, averages.chain[10 * (k + 1) - 1])
    assert torch.equal(seen["start 1"], seen[0][1])


class Unused(EMABalance):
    """Averages and never uses it."""

    def on_experience_end(self, trainer, module, experience):
        self._forget()


@pytest.mark.parametrize("preset", PRESETS)
def test_an_average_that_is_not_used_leaves_training_alone(preset):
    plain = fit([ExperienceReplay(16)])
    watched = fit([ExperienceReplay(16), Unused(preset)])
    assert torch.equal(weights(plain), weights(watched))


def test_frozen_and_unused_tensors_are_left_out():
    module = make_module()
    module.net[1].weight.requires_grad_(False)
    module.idle = nn.Parameter(torch.ones(3))
    ema = Unused()
    averages = Averages(ema)
    names = []

    class Names(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            names.append((set(ema.average), set(ema.gradient)))

    fit([ema, averages, Names()], module)
    assert names[0] == (
        {"net.1.bias", "net.3.weight", "net.3.bias", "idle"},
        {"net.1.bias", "net.3.weight", "net.3.bias"},
    )


def test_accumulated_batches_are_one_update():
    ema = Unused()
    updates = []
    original = ema.update
    ema.update = lambda *args: updates.append(1) or original(*args)
    fit([ema], accumulate_grad_batches=2)
    assert len(updates) == 18


def test_the_late_start_makes_the_first_step_a_copy():
    ema = EMABalance(init="after_first_step")
    averages, live = Averages(ema), []

    class Live(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            live.append(weights(pl_module))

    fit([Live(), ema, averages])
    assert torch.equal(averages.chain[0], live[0])
    assert torch.equal(averages.chain[10], live[10])


def test_the_average_is_evaluated_beside_the_live_weights_without_a_trace(tmp_path):
    plain = fit([EMABalance()])
    gaps = [
        StabilityGap(dir=tmp_path / "live", plot=False),
        StabilityGap(dir=tmp_path / "ema", plot=False, view="averaged"),
    ]
    expected = []

    class ByCopy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copy = make_module()
            copy.load_state_dict({name: ema.average[name] for name in pl_module.state_dict()})
            x, y = trainer.datamodule.stream[0].test.batch(torch.arange(40))
            expected.append((copy(x).argmax(1) == y).float().mean().item())

    ema = EMABalance()
    module = fit([ema, *gaps, ByCopy()])
    assert torch.equal(weights(module), weights(plain))
    table = pd.read_csv(tmp_path / "ema" / "history.csv")
    assert table[table.phase == "step"].E0.tolist() == pytest.approx(expected)
    assert table.E0.tolist() != pd.read_csv(tmp_path / "live" / "history.csv").E0.tolist()


def test_an_unknown_view_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="known: live, averaged"):
        fit([EMABalance(), StabilityGap(dir=tmp_path, view="slow")])


@pytest.mark.parametrize("preset", ["reference", "paper", "fisher"])
def test_it_resumes_bit_identically(preset, tmp_path):
    def run(**settings):
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return weights(fit([EMABalance(preset), checkpoint], enable_checkpointing=True, **settings))

    whole = run()
    for step in (1, 10, 14, 25):
        assert torch.equal(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole), step


def test_rates_are_logged_by_block(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    fit([EMABalance()], logger=logger, log_every_n_steps=1)
    table = pd.read_csv(f"{logger.log_dir}/metrics.csv")
    assert table["ema_balance/fallback"].iloc[0] == 1
    live = table[["ema_balance/live/net.1", "ema_balance/live/net.3"]].dropna()
    assert len(live) == 30
    assert ((live > 0) & (live < 1)).all().all()


@pytest.mark.parametrize("values", [{"preset": "mine"}, {"decay": 1.0}, {"every": 0}, {"init": "never"}])
def test_a_bad_value_is_refused(values):
    with pytest.raises(ConfigurationError):
        EMABalance(**values)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
