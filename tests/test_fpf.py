from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import vgg11

from clkit import ConfigurationError, ModuleDrift, Stream, StreamDataModule
from clkit.evaluation.prefix import PrefixTable
from clkit.method.module_kinds import only, parts, select
from clkit.models.networks import CNN, MLP, slim_resnet18, tiny_vit
from clkit.rng import private_rng
from clkit.strategies import EWC, FPF, KFPF, ExperienceReplay, Naive
from clkit.strategies.fpf import preset, triggers


def fit(callbacks, module=None, stream=None, **settings):
    stream = make_stream() if stream is None else stream
    module = make_module() if module is None else module
    data = StreamDataModule(stream, batch_size=8, epochs=2)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return module


class Normed(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)
        )


def normed():
    torch.manual_seed(0)
    return Normed()


def test_published_triggers():
    assert triggers(20, 3) == [6, 13, 20]
    assert triggers(7810, 9) == [867, 1735, 2603, 3471, 4338, 5206, 6074, 6942, 7810]


@given(st.integers(1, 5000), st.integers(1, 300))
def test_triggers_are_distinct_even_and_end_with_the_stream(steps, k):
    found = triggers(steps, k)
    gaps = {b - a for a, b in zip([0, *found], found, strict=False)}
    assert len(found) == min(k, steps)
    assert found[-1] == steps
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


@pytest.mark.parametrize(("reduction", "term"), [("mean", 0.25), ("sum", 0.5)])
def test_distillation_by_hand(reduction, term):
    class Fixed(UserModule):
        def forward(self, x):
            return x

    strategy = KFPF(distillation=0.5, reduction=reduction)
    module = Fixed()
    batch = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.zeros(1, 2))
    module.trainer = pl.Trainer(**QUIET)
    module.trainer.datamodule = StreamDataModule(make_stream(2))
    assert float(strategy.phase_loss(module, batch)) == pytest.approx(0.313262 + term, abs=1e-6)
    same = (*batch[:2], batch[0])
    assert float(strategy.phase_loss(module, same)) == pytest.approx(0.313262, abs=1e-6)


class Watch(pl.Callback):
    """Keeps the state before and after the step of a phase; the strategy before it in the list runs the phase."""

    def __init__(self, step, store):
        self.step, self.store = step, store

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            momentum = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
            self.store.append((state, momentum))


@pytest.mark.parametrize(
    ("chosen", "moved"),
    [
        ("head", {"net.5.weight", "net.5.bias"}),
        ("norm", {f"net.{i}.{n}" for i in (1, 4) for n in ("weight", "bias", "running_mean", "running_var")}),
        ("last_block+head", {"net.3.weight", "net.3.bias", "net.5.weight", "net.5.bias"}),
        (["net.4"], {f"net.4.{n}" for n in ("weight", "bias", "running_mean", "running_var")}),
    ],
)
def test_a_phase_touches_nothing_outside_the_chosen_modules(chosen, moved):
    before, after = [], []
    strategy = KFPF(2, select=chosen, steps=5, restart=False)
    module = fit([Watch(15, before), strategy, Watch(15, after)], normed())
    (old, old_momentum), (new, new_momentum) = before[0], after[0]
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    counters = {name for name in differing if name.endswith("num_batches_tracked")}
    assert differing - counters == moved
    assert counters == {f"{name.removesuffix('.running_mean')}.num_batches_tracked" for name in moved if "mean" in name}
    assert str(old_momentum) == str(new_momentum)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(layer.training for layer in module.net)


def test_the_momentum_of_chosen_modules_alone_is_forgotten():
    after = []
    fit([KFPF(2, select="head", steps=5), Watch(15, after)], normed())
    assert set(after[0][1]) == set(range(8))  # of ten parameters the head has the last two


@pytest.mark.parametrize("strategy", [KFPF(0), KFPF(3, steps=0, restart=False), KFPF(3, lr=0.0, restart=False)])
def test_without_phases_steps_or_rate_it_is_plain_training_bit_for_bit(strategy):
    assert torch.equal(weights(fit([strategy])), weights(fit([Naive()])))


def test_running_statistics_may_change_at_rate_zero_if_they_are_chosen():
    plain, phased = fit([Naive()], normed()), fit([KFPF(1, lr=0.0, select="norm", restart=False)], normed())
    assert torch.equal(weights(plain), weights(phased))
    assert not torch.equal(plain.net[1].running_mean, phased.net[1].running_mean)


def test_fpf_on_all_modules_is_plain_finetuning_on_the_memory():
    replay = ExperienceReplay(30)
    actual = fit([replay, FPF("all", steps=20, batch_size=7, lr=0.05, clip=0.5)])
    expected = fit([ExperienceReplay(30)])
    x, y = replay.remembered()
    rng = private_rng(0, 20, 0)
    optimizer = torch.optim.SGD(expected.parameters())
    for step in range(20):
        rows = torch.from_numpy(rng.choice(30, 7, replace=False))
        optimizer.param_groups[0]["lr"] = 0.05 * (20 - step) / 20
        optimizer.zero_grad()
        cross_entropy(expected(x[rows]), y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(weights(actual), weights(expected))


@pytest.mark.parametrize(
    ("network", "chosen"),
    [
        (lambda: MLP((6,), 6, (16, 16)), "head"),
        (lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), slim_resnet18((6, 1, 1), 6, 4)), ["*layer4*", "*fc*"]),
        (lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), CNN((6, 1, 1), 6, (4, 4, 4))), "last_block+head"),
        (lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Upsample(4), tiny_vit((6, 4, 4), 6)), ["*head*"]),
        (lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 6)), "head"),
    ],
)
def test_cached_prefix_activations_give_the_same_phase(network, chosen, monkeypatch):
    def run():
        torch.manual_seed(0)
        module = UserModule()
        module.net = network()
        return fit([KFPF(2, capacity=40, select=chosen, steps=12, lr=0.1)], module)

    built = []
    build = PrefixTable.build.__func__
    monkeypatch.setattr(PrefixTable, "build", classmethod(lambda *args: built.append(build(*args)) or built[-1]))
    cached = run()
    monkeypatch.setattr(PrefixTable, "build", classmethod(lambda *args: None))
    plain = run()
    torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-4, atol=1e-5)
    has_dropout = any(isinstance(layer, nn.Dropout) and layer.p for layer in cached.modules())
    assert [table is None for table in built] == [has_dropout] * 2


@pytest.mark.parametrize("when", ["end", "experience"])
def test_fpf_runs_at_the_end_or_after_each_experience(when):
    strategy = FPF(steps=1, when=when)
    fit([ExperienceReplay(30), strategy])
    assert strategy.phases == (1 if when == "end" else 3)


def test_phases_leave_the_step_counter_and_the_schedule_alone():
    class Scheduled(UserModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    seen = []
    for strategy in (Naive(), KFPF(5, steps=9)):
        rates = []

        class Rates(pl.Callback):
            def on_train_batch_end(self, trainer, *args, rates=rates):
                rates.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))

        fit([strategy, Rates()], Scheduled())
        seen.append(rates)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 30


def test_a_phase_that_explodes_is_taken_back():
    replay = ExperienceReplay(30)
    with pytest.warns(UserWarning, match="takes back a phase"):
        actual = fit([replay, FPF("all", lr=1e30, steps=20)])
    assert torch.equal(weights(actual), weights(fit([ExperienceReplay(30)])))


def test_a_phase_that_ends_above_its_start_is_taken_back_though_finite():
    class Ascends(FPF):
        """Its gradient points the wrong way, so its loss rises."""

        def phase_loss(self, module, batch):
            loss = super().phase_loss(module, batch)
            return loss.detach() + (loss.detach() - loss)

    replay = ExperienceReplay(30)
    with pytest.warns(UserWarning, match="raised the loss on the memory"):
        actual = fit([replay, Ascends("all", lr=0.01, steps=40)])
    assert torch.equal(weights(actual), weights(fit([ExperienceReplay(30)])))


@pytest.mark.parametrize(
    ("optimizer", "lr", "expected"),
    [(torch.optim.SGD, None, 0.1), (torch.optim.Adam, None, 0.05), (torch.optim.AdamW, 0.3, 0.3)],
)
def test_the_rate_of_a_phase_does_not_come_from_an_adaptive_optimizer(optimizer, lr, expected):
    trainer = SimpleNamespace(optimizers=[optimizer(make_module().parameters(), lr=0.2)])
    assert FPF(lr=lr)._rate(trainer) == expected


def test_a_memory_of_one_class_is_skipped():
    def one_class():
        first = make_stream()[0]
        first.train.y.zero_()
        return Stream.from_datasets([first.train], [first.test], n_classes=6)

    with pytest.warns(UserWarning, match="fewer than 2 classes"):
        module = fit([KFPF(2)], stream=one_class())
    assert torch.equal(weights(module), weights(fit([Naive()], stream=one_class())))


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([FPF()], "memory of another strategy"),
        ([Naive(), FPF()], "memory of another strategy"),
        ([FPF(), ExperienceReplay(10)], "none before it"),
        ([KFPF(select="middle")], "middle"),
        ([KFPF(select=["net.77"])], "nearest names are net.*"),
        ([KFPF(select="norm")], "No trainable module"),
        ([KFPF(select="drift")], "ModuleDrift"),
    ],
)
def test_what_cannot_work_is_refused_at_setup(callbacks, words):
    with pytest.raises(ConfigurationError, match=words):
        fit(callbacks)


@pytest.mark.parametrize(
    "settings", [{"steps": -1}, {"batch_size": 0}, {"lr": -0.1}, {"k": -1}, {"distillation": -1.0}, {"capacity": -1}]
)
def test_bad_numbers_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        KFPF(**settings)


def test_bad_when_is_refused():
    with pytest.raises(ConfigurationError, match="when='never'"):
        FPF(when="never")


def test_drift_chooses_the_modules_once_two_experiences_are_over(tmp_path):
    drift = ModuleDrift(dir=tmp_path)
    strategy = KFPF(3, select="drift", steps=1)
    before, after = [], []
    fit([Watch(10, before), Watch(30, before), strategy, Watch(10, after), Watch(30, after), drift], normed())
    chosen = {name for name in before[1][0] if not torch.equal(before[1][0][name], after[1][0][name])}
    layers = {name.rpartition(".")[0] for name in chosen}
    assert layers == set(drift.sensitive())
    first = {name for name in before[0][0] if not torch.equal(before[0][0][name], after[0][0][name])}
    assert {name.rpartition(".")[0] for name in first} == {"net.1", "net.4", "net.5"}


@pytest.mark.parametrize(
    ("network", "class_incremental", "domain_incremental"),
    [
        (MLP((1, 8, 8), 10), "head", "first+head"),
        (slim_resnet18((3, 32, 32), 10), "norm+head", "norm+first"),
        (tiny_vit((1, 8, 8), 10), "norm+head", "norm+first+head"),
        (vgg11(num_classes=10), "head", "first+head"),
    ],
)
def test_published_presets(network, class_incremental, domain_incremental):
    assert preset(network, "class-incremental") == class_incremental
    assert preset(network, "domain-incremental") == domain_incremental


@pytest.mark.parametrize(
    ("network", "block"),
    [
        (MLP((1, 8, 8), 10), {"3"}),
        (CNN((1, 8, 8), 10), {"6"}),
        (vgg11(num_classes=10), {"classifier.3"}),
        (
            slim_resnet18((3, 32, 32), 10),
            {f"layer4.1.{n}" for n in ("conv1", "bn1", "bn1.stats", "conv2", "bn2", "bn2.stats")},
        ),
        (
            tiny_vit((1, 8, 8), 10),
            {f"blocks.3.{n}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")},
        ),
    ],
)
def test_the_last_block_is_all_of_the_last_repeated_one_or_the_layer_before_the_head(network, block):
    chosen = select(network, "last_block")
    assert {part.name for part in chosen} == block
    both = {part.name for part in select(network, "last_block+head")} - block
    assert both == {part.name for part in parts(network) if part.kind == "head"}


def test_a_network_of_one_layer_has_no_last_block():
    with pytest.raises(ConfigurationError, match="No trainable module of Linear"):
        select(nn.Linear(3, 2), "last_block")


def test_published_sizes_of_resnet18():
    network = slim_resnet18((3, 32, 32), 10, width=64)
    found = parts(network)
    sizes = {
        kind: sum(part.size for part in found if part.kind == kind and not part.is_statistics)
        for kind in ("norm", "first", "head")
    }
    assert sizes == {"norm": 9600, "first": 1728, "head": 5130}
    assert sum(part.size for part in found if not part.is_statistics) == 11_173_962
    assert sum(part.size for part in found if part.is_statistics) == 9600


def test_only_restores_what_was_frozen_before():
    module = normed()
    module.net[0].weight.requires_grad_(False)
    module.net[4].eval()
    flags = [parameter.requires_grad for parameter in module.parameters()]
    modes = [layer.training for layer in module.modules()]
    with only(module, select(module, "head")) as params:
        assert [tuple(p.shape) for p in params] == [(6, 16), (6,)]
        assert not module.net[1].training
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert [layer.training for layer in module.modules()] == modes


class Prescribed(UserModule):
    """Takes exactly the steps it is told, whatever the data."""

    class Layer(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.values = nn.Parameter(torch.zeros(n))

    def __init__(self, moves):
        super().__init__(lr=1.0, momentum=0.0)
        self.net = nn.ModuleDict({"conv1": self.Layer(2), "mid": self.Layer(4), "fc": self.Layer(2)})
        self.moves = moves

    def training_step(self, batch, batch_idx):
        move = self.moves[self.trainer.global_step]
        return -sum((self.net[name].values * torch.tensor(delta)).sum() for name, delta in move.items())


MOVES = [
    {"conv1": [1.0, -1.0], "mid": [0.4, 0.0, 0.0, 0.0], "fc": [2.0, 2.0]},
    {"conv1": [0.0, 0.0], "mid": [0.0, 0.4, 0.0, 0.0], "fc": [-2.0, 3.0]},
]


def test_the_published_change_metric(tmp_path):
    stream = make_stream(2)
    data = StreamDataModule(stream, batch_size=8, steps=1)
    drift = ModuleDrift(dir=tmp_path)
    trainer = pl.Trainer(max_epochs=2, callbacks=[drift], **QUIET)
    trainer.fit(Prescribed(MOVES), datamodule=data)
    rows = (tmp_path / "drift.csv").read_text().splitlines()
    assert rows[0] == "step,experience,point,module,kind,size,within,across"
    table = [row.split(",") for row in rows[1:]]
    assert [row[:4] for row in table] == [
        *(["1", "0", "1", f"net.{name}"] for name in ("conv1", "mid", "fc")),
        *(["2", "1", "1", f"net.{name}"] for name in ("conv1", "mid", "fc")),
    ]
    assert [float(row[6]) for row in table] == pytest.approx([1.0, 0.1, 2.0, 0.0, 0.1, 2.5])
    assert [row[7] for row in table[:3]] == ["", "", ""]
    assert [float(row[7]) for row in table[3:]] == pytest.approx([0.0, 0.1, 2.5])
    scores = drift.scores()
    assert list(scores.values()) == pytest.approx([0, 0.03846, 0.96154], abs=1e-5)
    assert drift.sensitive(threshold=1 / 3) == ["net.fc"]
    assert drift.sensitive(budget=0.75) == ["net.fc", "net.mid"]


def test_change_at_several_points_against_snapshots(tmp_path):
    kept = {}

    class Snapshots(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            kept[trainer.global_step] = {n: p.detach().clone() for n, p in module.named_parameters()}

    module = make_module()
    kept[0] = {n: p.detach().clone() for n, p in module.named_parameters()}
    drift = ModuleDrift(3, dir=tmp_path)
    fit([drift, Snapshots()], module)
    steps = [3, 6, 10, 13, 16, 20, 23, 26, 30]
    assert [step for step, _, _ in drift._rows] == steps
    layers = {"net.1": ("net.1.weight", "net.1.bias"), "net.3": ("net.3.weight", "net.3.bias")}

    def change(a, b):
        return [
            sum((kept[b][n] - kept[a][n]).abs().sum() for n in names) / sum(kept[0][n].numel() for n in names)
            for names in layers.values()
        ]

    for i, (a, b) in enumerate(zip([0, *steps], steps, strict=False)):
        assert drift._within[i].tolist() == pytest.approx([float(v) for v in change(a, b)], rel=1e-5)
        if i >= 3:
            expected = change(steps[i - 3], b)
            assert drift._across[i].tolist() == pytest.approx([float(v) for v in expected], rel=1e-5)


@pytest.mark.parametrize("above", [Naive, EWC])
def test_drift_changes_nothing(above, tmp_path):
    assert torch.equal(weights(fit([above(), ModuleDrift(dir=tmp_path)])), weights(fit([above()])))


def test_drift_goes_on_after_a_resume(tmp_path):
    def run(folder, max_epochs, checkpoint=None):
        data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
        saves = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        settings = {**QUIET, "enable_checkpointing": True}
        callbacks = [ModuleDrift(4, dir=folder), saves]
        trainer = pl.Trainer(max_epochs=max_epochs, callbacks=callbacks, **settings)
        trainer.fit(make_module(), datamodule=data, ckpt_path=checkpoint, weights_only=True)

    run(tmp_path / "whole", 6)
    run(tmp_path / "resumed", 6, tmp_path / "whole" / "step=16.ckpt")
    assert (tmp_path / "resumed" / "drift.csv").read_text() == (tmp_path / "whole" / "drift.csv").read_text()
