"""Cheaper ways of evaluating give the very numbers of the plain one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from command_line import wait_for
from plain import QUIET, UserModule, make_module, make_stream
from torch import nn

from clkit import (
    Classifier,
    ConfigurationError,
    InMemoryDataset,
    StabilityGap,
    Stream,
    StreamCheckpoint,
    StreamDataModule,
)
from clkit.evaluation import process_evaluator, scores
from clkit.evaluation.prefix import FrozenPrefix


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(gap, module, stream=None, callbacks=(), epochs=2, **options):
    torch.manual_seed(1)
    data = StreamDataModule(stream or make_stream(), batch_size=8, epochs=epochs)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[*callbacks, gap], **{**QUIET, **options})
    trainer.fit(module, datamodule=data)
    return (gap.dir / "history.csv").read_text()


class Frozen(UserModule):
    """The first layers are frozen, BatchNorm among them is not in evaluation mode unless asked for."""

    def __init__(self, still=True):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True))
        self.net = nn.Linear(32, 6)
        self.body.requires_grad_(False)
        self.still = still

    def forward(self, x):
        return self.net(self.body(x))

    def on_train_epoch_start(self):
        self.body.train(not self.still)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.5)


def seeded(build, *args):
    torch.manual_seed(0)
    return build(*args)


class Watch(pl.Callback):
    """Notes how many modules are replayed at each step."""

    def __init__(self, gap):
        self.gap, self.replayed = gap, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.replayed.append(len(self.gap._evaluator.prefix.modules))


def test_a_frozen_prefix_is_replayed_with_the_same_history(tmp_path):
    gap = StabilityGap(dir=tmp_path / "cached", plot=False, batch_size=7)
    watch = Watch(gap)
    cached = fit(gap, seeded(Frozen), callbacks=[watch])
    plain = fit(StabilityGap(dir=tmp_path / "plain", plot=False, batch_size=7, prefix_cache=False), seeded(Frozen))
    assert cached == plain
    # anew at each experience; its first module is the whole body
    assert watch.replayed == [0, *[1] * 9] * 3


def test_statistics_that_move_end_the_prefix(tmp_path):
    gap = StabilityGap(dir=tmp_path / "cached", plot=False)
    watch = Watch(gap)
    cached = fit(gap, seeded(Frozen, False), callbacks=[watch])
    plain = fit(StabilityGap(dir=tmp_path / "plain", plot=False, prefix_cache=False), seeded(Frozen, False))
    assert cached == plain
    # found out at the second evaluation; the linear layer before the BatchNorm stays
    assert watch.replayed[:10] == [0, 1, *[2] * 8]


class Thawing(pl.Callback):
    """Changes what is frozen, and frozen weights, in mid-experience."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            pl_module.body[1].bias.requires_grad_(True)
        if trainer.global_step == 13:
            with torch.no_grad():
                pl_module.body[1].weight.mul_(0.5)


def test_the_cache_starts_anew_when_the_frozen_part_changes(tmp_path):
    texts = [
        fit(StabilityGap(dir=tmp_path / str(use), plot=False, prefix_cache=use), seeded(Frozen), callbacks=[Thawing()])
        for use in (True, False)
    ]
    assert texts[0] == texts[1]


def test_a_change_that_pytorch_does_not_count_is_refused(tmp_path):
    class Hidden(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.body[1].weight.data.mul_(1.01)

    with pytest.raises(ConfigurationError, match="prefix_cache=False"):
        fit(StabilityGap(dir=tmp_path, plot=False), seeded(Frozen), callbacks=[Hidden()])


def test_a_cache_above_its_limit_is_given_up(tmp_path):
    with pytest.warns(UserWarning, match="prefix_cache_limit"):
        small = fit(StabilityGap(dir=tmp_path / "small", plot=False, prefix_cache_limit=100), seeded(Frozen))
    assert small == fit(StabilityGap(dir=tmp_path / "plain", plot=False, prefix_cache=False), seeded(Frozen))


def cached_and_plain(module, inputs, steps=3):
    """Logits with and without the cache while the trainable part moves, and the cache."""
    cache = FrozenPrefix(module)
    for _ in range(steps):
        module.eval()
        with torch.no_grad():
            cache.begin()
            replayed = cache.run("key", lambda: module(inputs))
            plain = module(inputs)
            cache.check()
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(replayed, plain)
    return cache


def freeze(module, *trainable):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(part in name for part in trainable))
    return module


def tiny_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=4, drop_rate=0.1)


@pytest.mark.parametrize(
    ("build", "trainable", "expected"),
    [
        (tiny_vit, ("blocks.3", "head"), {"patch_embed", "blocks.0", "blocks.1", "blocks.2"}),
        (tiny_vit, ("head",), {"patch_embed", "blocks", "norm"}),
        (tiny_vit, ("pos_embed", "head"), set()),  # everything after the patch embedding depends on it
        (tiny_vit, ("",), set()),
        (lambda: timm.create_model("resnet10t", num_classes=5), ("layer4", "fc"), {"layer1", "layer3"}),
    ],
    ids=["vit last block", "vit probe", "vit position", "vit all", "resnet last stage"],
)
def test_the_prefix_of_known_networks(build, trainable, expected):
    torch.manual_seed(0)
    module = freeze(build(), *trainable)
    cache = cached_and_plain(module, torch.randn(3, 3, 32, 32))
    names = {child: name for name, child in module.named_modules()}
    found = {names[child] for child in cache.modules}
    assert expected <= found
    assert bool(expected) == bool(found)
    # only the last output of the chain is needed, and kept
    assert not expected or cache.bytes < 3 * 200 * 192 * 4


class Trap(nn.Module):
    """Lets the frozen layer's input depend on a trainable tensor in a way autograd does not see."""

    def __init__(self, how):
        super().__init__()
        self.shift, self.body, self.head = nn.Parameter(torch.zeros(6)), nn.Linear(6, 400), nn.Linear(400, 3)
        self.body.requires_grad_(False)
        self.how = how

    def forward(self, x):
        shift = {
            "detach": lambda: self.shift.detach(),
            "data": lambda: self.shift.data,
            "item": lambda: self.shift[0].item(),
            "numpy": lambda: torch.from_numpy(self.shift.detach().numpy()),
            "elsewhere": lambda: 0.0,
        }[self.how]()
        hidden = self.body(x + shift)
        if self.how == "elsewhere":
            return self.head(hidden) + (hidden.mean() * self.shift).sum()
        return self.head(hidden)


@pytest.mark.parametrize("how", ["detach", "data", "item", "numpy"])
def test_hidden_dependence_on_a_trainable_tensor_is_no_prefix(how):
    torch.manual_seed(0)
    assert not cached_and_plain(Trap(how), torch.randn(4, 6)).modules


def test_an_output_used_in_two_places_is_kept():
    torch.manual_seed(0)
    assert len(cached_and_plain(Trap("elsewhere"), torch.randn(4, 6)).modules) == 1


def test_a_module_that_is_called_in_the_prefix_and_after_it_is_replayed_in_the_prefix_alone():
    torch.manual_seed(0)
    relu = nn.ReLU()
    module = freeze(nn.Sequential(nn.Linear(6, 400), relu, nn.Linear(400, 4), relu, nn.Linear(4, 3)), "2", "4")
    cache = cached_and_plain(module, torch.randn(4, 6))
    assert cache.modules == [module[0], relu]


class Counting(nn.Module):
    """Its frozen part leaves something behind that the rest uses."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 400), nn.Linear(400, 3)
        self.body.requires_grad_(False)
        self.body.register_forward_hook(self.leave)
        self.left = []

    def leave(self, module, args, output):
        self.left.append(args[0].mean())

    def forward(self, x):
        return self.head(self.body(x)) + len(self.left)


def test_a_forward_that_cannot_be_replayed_is_computed():
    module = Counting()
    cache = FrozenPrefix(module)
    with torch.no_grad(), pytest.warns(UserWarning, match="does not give the same numbers"):
        first = cache.run("key", lambda: module(torch.ones(2, 6)))
    assert first.shape == (2, 3)
    assert not cache.modules


@pytest.mark.slow
def test_an_asynchronous_evaluation_writes_the_same_history(tmp_path, monkeypatch):
    folders, text = [], {}
    original = process_evaluator.scratch
    monkeypatch.setattr(process_evaluator, "scratch", lambda: folders.append(original()) or folders[0])
    for name, settings in {"process": {"asynchronous": True, "queue": 3}, "plain": {}}.items():
        gap = StabilityGap(dir=tmp_path / name, plot=False, **settings)
        text[name] = fit(gap, seeded(Frozen, False))
    assert text["process"] == text["plain"]
    assert len(folders) == 1
    assert not os.path.exists(folders[0].name)


class KillWorker(pl.Callback):
    def __init__(self, gap, step):
        self.gap, self.step = gap, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            for process in self.gap._evaluator._executor._processes.values():
                os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_nothing_is_lost(tmp_path):
    gap = StabilityGap(dir=tmp_path / "killed", plot=False, asynchronous=True, queue=4)
    with pytest.warns(UserWarning, match="evaluation process died"):
        killed = fit(gap, make_module(), callbacks=[KillWorker(gap, 14)])
    assert killed == fit(StabilityGap(dir=tmp_path / "plain", plot=False), make_module())


@pytest.mark.slow
def test_asynchronous_evaluation_resumes_from_a_checkpoint(tmp_path):
    def run(folder, ckpt_path=None, max_epochs=6, asynchronous=True):
        data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
        gap = StabilityGap(dir=folder, plot=False, asynchronous=asynchronous)
        trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[gap], **{**QUIET, "enable_checkpointing": True})
        trainer.fit(make_module(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        if max_epochs < 6:
            trainer.save_checkpoint(folder / "at.ckpt")
        return (folder / "history.csv").read_bytes()

    run(tmp_path / "part", max_epochs=3)
    resumed = run(tmp_path / "part", ckpt_path=tmp_path / "part" / "at.ckpt")
    assert resumed == run(tmp_path / "whole", asynchronous=False)


def test_a_module_that_cannot_be_sent_is_refused(tmp_path):
    module = make_module()
    module.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match="cannot be pickled"):
        fit(StabilityGap(dir=tmp_path, plot=False, asynchronous=True), module)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queue", [1, 4])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_copy_of_the_module_beside_the_training_writes_the_same_history(tmp_path, device, queue, prefix_cache):
    text, weights = {}, {}
    settings = {"asynchronous": True, "device": device, "queue": queue, "prefix_cache": prefix_cache, "batch_size": 5}
    for name, chosen in {"beside": settings, "plain": {"batch_size": 5}}.items():
        module = seeded(Frozen, False)
        gap = StabilityGap(dir=tmp_path / name, plot=False, **chosen)
        text[name] = fit(gap, module, accelerator="cpu" if device == "cpu" else "gpu", devices=1)
        weights[name] = list(module.cpu().parameters())
    assert text["beside"] == text["plain"]
    assert all(torch.equal(a, b) for a, b in zip(weights["beside"], weights["plain"], strict=True))


class Thaw(pl.Callback):
    """Writes to frozen weights in the middle of an experience."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 9:
            with torch.no_grad():
                next(p for p in pl_module.parameters() if not p.requires_grad).add_(0.5)


def test_a_copy_follows_frozen_weights_that_change_and_batch_norm_statistics(tmp_path):
    run = lambda name, **settings: fit(  # noqa: E731
        StabilityGap(dir=tmp_path / name, plot=False, **settings), seeded(Frozen, True), callbacks=[Thaw()]
    )
    beside = run("beside", asynchronous=True, device="cpu")
    assert beside == run("plain")
    assert beside != fit(StabilityGap(dir=tmp_path / "unchanged", plot=False), seeded(Frozen, True))


def test_no_memory_for_a_copy_is_reported_and_nothing_is_lost(tmp_path):
    calls = []

    def score(module, batch):
        calls.append(module)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("no room")
        return scores.accuracy(module, batch)

    gap = StabilityGap(dir=tmp_path / "short", plot=False, asynchronous=True, device="cpu", score=score)
    module = make_module()
    with pytest.warns(UserWarning, match="ran out of memory"):
        short = fit(gap, module)
    assert short == fit(StabilityGap(dir=tmp_path / "plain", plot=False, score=scores.accuracy), make_module())
    assert calls[8] is not module
    assert all(call is module for call in calls[9:])


def test_a_device_needs_asynchronous_and_must_exist(tmp_path):
    with pytest.raises(ConfigurationError, match="device='cpu' is for asynchronous=True"):
        StabilityGap(device="cpu")
    with pytest.raises(ConfigurationError, match="device='cuda:77' is not possible here"):
        StabilityGap(asynchronous=True, device="cuda:77")
    module = make_module()
    module.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match="cannot be copied"):
        fit(StabilityGap(dir=tmp_path, plot=False, asynchronous=True, device="cpu"), module)


@pytest.mark.parametrize("accumulated", [1, 4, 7])
def test_snapshots_evaluated_together_write_the_same_history(tmp_path, accumulated):
    together = fit(StabilityGap(dir=tmp_path / "a", plot=False, snapshots=accumulated), seeded(Frozen, False))
    assert together == fit(StabilityGap(dir=tmp_path / "b", plot=False), seeded(Frozen, False))


def test_a_forward_that_cannot_be_vectorised_is_refused(tmp_path):
    class Branching(UserModule):
        def forward(self, x):
            logits = self.net(x)
            return logits if self.training or logits.sum().item() > 0 else -logits

    with pytest.raises(ConfigurationError, match="use snapshots=1"):
        fit(StabilityGap(dir=tmp_path, plot=False, snapshots=4), seeded(Branching))


def test_masks_restrict_the_competing_logits(tmp_path):
    """A module with fixed logits: every input says class 5 first, then its own class."""

    class Fixed(UserModule):
        def forward(self, x):
            own = nn.functional.one_hot(x[:, 0].long(), 6).float()
            return own + torch.tensor([0.0, 0.0, 0.0, 1.5, 0.0, 3.0]) + 0.0 * self.net(x)

    labels = [torch.tensor([2 * k, 2 * k + 1]) for k in range(3)]
    sets = [InMemoryDataset(y[:, None].float().expand(-1, 6).contiguous(), y) for y in labels]
    stream = Stream.from_datasets(sets, sets, n_classes=6)
    final = {}
    for mask in ("none", "seen", "experience"):
        gap = StabilityGap(dir=tmp_path / mask, plot=False, mask=mask)
        fit(gap, Fixed(), stream=stream, epochs=1)
        history = gap.history
        final[mask] = [history.select("end").scores[k, : k + 1].tolist() for k in range(3)]
        assert gap.metrics["mask"] == mask
    # only class 5 wins against all; against the seen ones 0 and 1 until 3 appears, which then wins; 4 never does
    assert final["none"] == [[0], [0, 0], [0, 0, 0.5]]
    assert final["seen"] == [[1], [0, 0.5], [0, 0, 0.5]]
    assert final["experience"] == [[1], [1, 0.5], [1, 0.5, 0.5]]


def test_a_mask_needs_accuracy_and_classes(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False, mask="seen", score=lambda module, batch: module(batch[0])[:, 0])
    with pytest.raises(ConfigurationError, match="needs score='accuracy'"):
        fit(gap, make_module())


def test_the_mask_of_a_classifier_is_recorded(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False)
    fit(gap, Classifier(nn.Sequential(nn.Flatten(), nn.Linear(6, 6)), n_classes=6, mask_unseen=True))
    assert gap.metrics["mask"] == "seen"


def test_scores_that_are_nan_count_as_zero_and_are_counted(tmp_path):
    class Sick(UserModule):
        def forward(self, x):
            return self.net(x).masked_fill(x[:, :1] > 2, torch.nan if not self.training else 0.0)

    stream = make_stream(2)
    sick = sum(int((e.test.batch(torch.arange(len(e.test)))[0][:, 0] > 2).sum()) for e in stream)
    gap = StabilityGap(dir=tmp_path, plot=False, every=1000, zero_shot=False)
    with pytest.warns(UserWarning, match="n_undefined"):
        fit(gap, make_module_of(Sick), stream=stream)
    first = int((stream[0].test.batch(torch.arange(40))[0][:, 0] > 2).sum())
    # initial on the first, last step and end of the first, last step and end of both
    assert gap.metrics["metrics"]["n_undefined"] == 3 * first + 2 * sick
    assert gap.metrics["metrics"]["ACC"] <= 1


def make_module_of(kind):
    torch.manual_seed(0)
    return kind()


def test_lazy_evaluation_is_near_the_exact_one_and_says_how_near(tmp_path):
    stream = make_stream(per_class=100)
    gaps = {lazy: StabilityGap(dir=tmp_path / str(lazy), plot=False, lazy=lazy) for lazy in (False, True)}
    scores = {}
    for lazy, gap in gaps.items():
        fit(gap, make_module(lr=0.005), stream=stream, epochs=4)
        scores[lazy] = gap.history.select("step").scores
    errors = np.abs(scores[True] - scores[False])
    about = gaps[True].metrics["approximation"]
    assert about["evaluated_share"] < 0.6
    assert 0 <= about["audited_error"] < 0.02
    assert np.nanmean(errors) < 0.01
    first = [0, 100, 200]  # everything is evaluated at the first step of an experience
    np.testing.assert_array_equal(errors[first], np.where(np.isnan(errors[first]), np.nan, 0))
    assert gaps[True].metrics["schedule"] == "every step, approximately"
    assert {"min-ACC", "ACC_subset", "AAA"} <= set(gaps[True].metrics["biased"])
    assert "ACC" not in gaps[True].metrics["biased"]
    assert gaps[False].metrics["approximation"] == {}


def test_lazy_evaluation_is_exact_and_cheap_where_nothing_moves(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False, lazy=True)
    fit(gap, make_module(lr=0.0, momentum=0.0))
    history = gap.history.select("step")
    for k in range(3):
        rows = history.scores[history.experience == k]
        assert (rows[:, : k + 1] == rows[0, : k + 1]).all()
    # ten evaluations of 40, 80 and 120 samples: one in full, and a twentieth nine times
    expected = (40 + 9 * 2 + 80 + 9 * 4 + 120 + 9 * 6) / (10 * (40 + 80 + 120))
    assert gap.metrics["approximation"] == {"evaluated_share": pytest.approx(expected), "audited_error": 0.0}


def test_lazy_evaluation_resumes_with_the_same_history(tmp_path):
    def run(folder, ckpt_path=None):
        data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
        gap = StabilityGap(dir=folder, plot=False, lazy=True)
        checkpoint = StreamCheckpoint(folder / "checkpoints", every_n_steps=4, keep=9)
        settings = {**QUIET, "enable_checkpointing": True}
        trainer = pl.Trainer(max_epochs=6, callbacks=[gap, checkpoint], **settings)
        trainer.fit(make_module(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return (folder / "history.csv").read_bytes(), gap.metrics["approximation"]

    whole = run(tmp_path / "whole")
    for step in (4, 16, 20):
        assert run(tmp_path / str(step), tmp_path / "whole" / "checkpoints" / f"step={step:09d}.ckpt") == whole


def test_lazy_evaluation_bears_masks_and_nan(tmp_path):
    class Sick(UserModule):
        def forward(self, x):
            return self.net(x).masked_fill(x[:, :1] > 2, torch.nan if not self.training else 0.0)

    texts = []
    for lazy in (False, True):
        gap = StabilityGap(dir=tmp_path / str(lazy), plot=False, lazy=lazy, mask="seen", every=100)
        with pytest.warns(UserWarning, match="n_undefined"):
            fit(gap, seeded(Sick))
        texts.append((tmp_path / str(lazy) / "history.csv").read_text())
    assert texts[0] == texts[1]


def test_lazy_evaluation_needs_accuracy(tmp_path):
    gap = StabilityGap(dir=tmp_path, lazy=True, score=lambda module, batch: module(batch[0])[:, 0])
    with pytest.raises(ConfigurationError, match="lazy=True compares logits"):
        fit(gap, make_module())


def test_modes_exclude_each_other():
    with pytest.raises(ConfigurationError, match="exclude each other"):
        StabilityGap(lazy=True, snapshots=4)


def test_two_evaluations_in_one_folder_are_refused(tmp_path):
    gaps = [StabilityGap(every=every, name=str(every), dir=tmp_path, plot=False) for every in (1, 5)]
    with pytest.raises(ConfigurationError, match="Two StabilityGaps write into"):
        fit(gaps[0], make_module(), callbacks=gaps[1:])


def test_a_history_before_the_first_fit_is_one_sentence():
    with pytest.raises(ConfigurationError, match="no history before the first fit"):
        print(StabilityGap().history)


def test_several_evaluations_side_by_side(tmp_path):
    gaps = [StabilityGap(every=every, name=f"every {every}", plot=False) for every in (1, 5)]
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
    trainer = pl.Trainer(max_epochs=6, callbacks=gaps, default_root_dir=tmp_path, **QUIET)
    trainer.fit(make_module(), datamodule=data)
    assert [len(gap.history.select("step")) for gap in gaps] == [30, 6]
    assert gaps[0].dir == tmp_path / "every 1"


KILLED = """
import os, signal, sys
import pytorch_lightning as pl
from plain import QUIET, make_module, make_stream
from clkit import StabilityGap, StreamDataModule

class Kill(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 12:
            print(*gap._evaluator._executor._processes, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

gap = StabilityGap(plot=False, asynchronous=True, queue=2)
data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
pl.Trainer(max_epochs=6, callbacks=[gap, Kill()], **QUIET).fit(make_module(), datamodule=data)
"""


@pytest.mark.slow
def test_the_process_ends_with_a_killed_training(tmp_path):
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    (worker,) = map(int, run.stdout.split())
    wait_for(lambda: not os.path.exists(f"/proc/{worker}"), 20)


@pytest.mark.parametrize("part", ["all", "body", "body in place"])
def test_compiled_modules_are_evaluated_as_they_are(part, tmp_path):
    module = seeded(Frozen)
    if part == "body":
        module.body = torch.compile(module.body, backend="eager")
    elif part == "body in place":
        module.body.compile(backend="eager")
        with torch.no_grad():
            prefix, x = FrozenPrefix(module.eval()), torch.zeros(8, 6)
            prefix.run(0, lambda: module(x))
        assert not prefix.modules
        module.train()
    else:
        module = torch.compile(module, backend="eager")
    compiled = fit(StabilityGap(dir=tmp_path / "compiled", plot=False), module)
    assert compiled == fit(StabilityGap(dir=tmp_path / "plain", plot=False), seeded(Frozen))
