from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, StreamDataModule
from clkit.strategies import AGEM, NGM, ExperienceReplay
from clkit.strategies.ngm import mean_entropy


def test_worked_example():
    ngm, gains = NGM(0.4), [torch.tensor(1.0)]
    for entropy in (math.log(2), 0.5, 0.1):
        gains.append(ngm.updated(gains[-1], torch.tensor(entropy)))
    assert [gain.item() for gain in gains] == pytest.approx([1, 1.27726, 1.44953, 1.44458], rel=1e-5)
    gain = torch.tensor(1.0)
    for n in range(1000):
        gain = ngm.updated(gain, torch.tensor(math.log(2)))
        if n == 21:
            assert gain.item() == pytest.approx(3.49955, rel=1e-5)
    assert gain.item() == pytest.approx(3.77259, rel=1e-5)


def test_the_mean_of_entropies_not_the_entropy_of_the_mean():
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    assert mean_entropy(logits).item() == pytest.approx(0.509115, rel=1e-5)


class Trace(pl.Callback):
    def __init__(self, *strategies):
        self.strategies, self.gains, self.weights = strategies, [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append(weights(module).clone())
        self.gains.extend(strategy.value.item() for strategy in self.strategies)


def fit(*strategies, momentum=0.9, **options):
    module, trace = make_module(momentum=momentum), Trace(*(s for s in strategies if isinstance(s, NGM)))
    data = StreamDataModule(make_stream(), batch_size=8)
    trainer = pl.Trainer(max_epochs=3, callbacks=[*strategies, trace], **QUIET, **options)
    trainer.fit(module, datamodule=data)
    return module, trace


class Plain(nn.Module):
    """Gain in the forward, raw weights in the optimizer: the published form, written out."""

    def __init__(self, base):
        super().__init__()
        self.first, self.last = base.net[1], base.net[3]

    def forward(self, x, gain):
        return gain * (self.first(x).relu() @ self.last.weight.T) + self.last.bias


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_a_plain_loop_with_the_gain_in_the_forward(momentum):
    ngm = NGM(0.4)
    module, trace = fit(ngm, momentum=momentum)
    base = make_module(momentum=momentum)
    plain, optimizer = Plain(base), torch.optim.SGD(base.parameters(), lr=0.1, momentum=momentum)
    gain, entropy, gains = 1.0, None, []
    for x, y in batches():
        if entropy is not None:
            gain = 0.9 * gain + 0.1 + 0.4 * entropy
        logits = plain(x, gain)
        p = logits.detach().softmax(dim=1)
        entropy = float(-(p * p.log()).sum(dim=1).mean())
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
        gains.append(gain)
    assert trace.gains == pytest.approx(gains, rel=1e-3)
    folded = torch.cat([plain.first.weight.flatten(), plain.first.bias, (gain * plain.last.weight).flatten(),
                        plain.last.bias])  # fmt: skip
    torch.testing.assert_close(weights(module), folded.detach(), rtol=1e-3, atol=1e-4)


def batches():
    """The batches of a fit, from one that trains nothing."""
    found = []

    class Keeps(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            found.append(tuple(part.clone() for part in batch))

    data = StreamDataModule(make_stream(), batch_size=8)
    pl.Trainer(max_epochs=3, callbacks=[Keeps()], **QUIET).fit(make_module(), datamodule=data)
    return found


def test_without_a_rate_it_is_the_base_run_bit_for_bit():
    assert torch.equal(weights(fit(ExperienceReplay(8), NGM(0.0))[0]), weights(fit(ExperienceReplay(8))[0]))


def test_gains_stay_within_their_bounds():
    ngm = NGM(0.4)
    gains = fit(ngm)[1].gains
    assert min(gains) >= 1
    assert max(gains) <= 1 + 0.4 * math.log(6) / 0.1
    assert max(gains) > 1.5


def test_a_step_moves_the_effective_weight_by_the_square_of_a_fixed_gain():
    base = make_module(momentum=0.0).net[3].weight.detach().clone()
    with_gain = {}
    for gain in (1.0, 1.5):
        module = make_module(momentum=0.0)
        with torch.no_grad():
            module.net[3].weight.div_(gain)
        trace = Trace()
        data = StreamDataModule(make_stream(), batch_size=8)
        trainer = pl.Trainer(max_epochs=1, max_steps=1, callbacks=[NGM(0.0, gain=gain), trace], **QUIET)
        trainer.fit(module, datamodule=data)
        with_gain[gain] = module.net[3].weight.detach() - base
    torch.testing.assert_close(with_gain[1.5], 2.25 * with_gain[1.0], rtol=1e-3, atol=1e-6)


def test_the_heads_momentum_is_zero_where_it_is_forgotten():
    _, trace = fit(NGM(0.0, forget_momentum=True))
    base = make_module()
    head = {id(base.net[3].weight)}
    groups = [
        {"params": [p for p in base.parameters() if (id(p) in head) is chosen], "momentum": momentum}
        for chosen, momentum in ((True, 0.0), (False, 0.9))
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(base(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(trace.weights[-1], weights(base), rtol=1e-4, atol=1e-5)


def test_what_edits_gradients_comes_before_it():
    fit(AGEM(8), NGM())
    with pytest.raises(ConfigurationError, match="put NGM after AGEM"):
        fit(NGM(), AGEM(8))


def test_layers_are_chosen_by_name_and_refused_without_a_match():
    module, _ = fit(NGM(0.4, layers=["net.*"]))
    assert not torch.equal(weights(module), weights(fit(NGM(0.4))[0]))
    with pytest.raises(ConfigurationError, match="matches no weight"):
        fit(NGM(layers=["conv*"]))
    for bad in ({"rate": -1.0}, {"decay": 1.0}, {"gain": 0.0}):
        with pytest.raises(ConfigurationError, match="not possible"):
            NGM(**bad)
