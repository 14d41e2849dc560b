"""What is done to the head for new classes: first rows, a warm-up, soft targets, frozen rows."""

from __future__ import annotations

import copy
import json

import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, Experience, InMemoryDataset, StabilityGap, Stream, StreamDataModule
from clkit.data.loader import choose_rows
from clkit.method.head import class_means
from clkit.method.strategy import Strategy
from clkit.rng import private_rng
from clkit.strategies import ExperienceReplay, FreezeOldRows, HeadInit, HeadWarmup, SoftTargets
from clkit.strategies.head_init import least_squares, matched
from clkit.strategies.head_warmup import step
from clkit.strategies.soft_targets import mean_rows, soft_targets
from clkit.testing import check_strategy, small_stream

PHI = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 1.0]])
Y = torch.tensor([0, 0, 1, 1])


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_worked_example_of_class_means_and_least_squares():
    means, _ = class_means(PHI, Y, 2)
    close(means, [[0.9, 0.3], [0.0, 1.0]])
    close(means @ PHI[1], [0.9, 0.6])
    rows = least_squares(PHI, Y, 2, 0.05)
    close(rows, [[0.964286, 0.053571], [-0.214286, 0.821429]])
    close(rows @ PHI[1], [0.803571, 0.321429])
    close(matched(rows, torch.tensor(2.0))[0], [1.996921, 0.110940])


def test_least_squares_is_ridge_on_one_hot_targets_and_parallel_to_means_for_a_large_ridge():
    generator = torch.Generator().manual_seed(0)
    phi, y = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    one_hot = torch.eye(3)[y]
    ridge = one_hot.T @ phi / 30 @ torch.linalg.inv(phi.T @ phi / 30 + 0.3 * torch.eye(4))
    torch.testing.assert_close(least_squares(phi, y, 3, 0.3), ridge, rtol=1e-4, atol=1e-5)
    # classes weigh the same, whatever their numbers of samples; one without any has no row and no weight
    uneven = torch.cat([phi, phi[y == 0], phi[y == 0]]), torch.cat([y, y[y == 0], y[y == 0]])
    torch.testing.assert_close(least_squares(*uneven, 4, 0.3)[:3], ridge, rtol=1e-4, atol=1e-5)
    means = torch.stack([phi[y == c].mean(dim=0) for c in range(3)])
    cosine = torch.nn.functional.cosine_similarity(least_squares(phi, y, 3, 1e6), means)
    torch.testing.assert_close(cosine, torch.ones(3))


def test_worked_example_of_a_warm_up_step():
    head = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        head.weight[2:] = 0
    old = head.weight[:2].detach().clone()
    step(head, torch.tensor([[1.0, 0.0]]), torch.tensor([2]), [2, 3], [2, 3], 0.1)
    close(head.weight[2:].detach(), [[0.05, 0.0], [-0.05, 0.0]])
    assert torch.equal(head.weight[:2], old)


def test_worked_example_of_soft_targets():
    old = torch.tensor([True, True, False, False])
    rows = torch.full((4, 4), 0.25)
    rows[1] = torch.tensor([0.1, 0.7, 0.2, 0.0])
    predicts_2 = torch.tensor([[0.1, 0.2, 0.6, 0.1]])
    close(soft_targets(predicts_2, torch.tensor([1]), rows, old), [[0.074074, 0.740741, 0.185185, 0.0]])
    uniform = soft_targets(predicts_2, torch.tensor([0]), rows, old)
    assert uniform[0, 0].item() == pytest.approx(0.571429, rel=1e-5)
    # of a new class its own softmax, and no edit of the class that it predicts, as that is the true one
    own = soft_targets(predicts_2, torch.tensor([2]), rows, old)
    close(own, [[0.1 / 1.4, 0.2 / 1.4, 1 / 1.4, 0.1 / 1.4]])


def test_mean_rows_are_uniform_where_nothing_was_right():
    rows = mean_rows(torch.tensor([[1.5, 0.5], [0.0, 0.0]]), torch.tensor([2.0, 0.0]))
    close(rows, [[0.75, 0.25], [0.5, 0.5]])


class Heads(pl.Callback):
    """The head and the rest, at each experience's start after the strategies, after each step, and at the end."""

    def __init__(self):
        self.starts, self.steps, self.backbones = [], [], []

    def on_experience_start(self, trainer, module, experience):
        self.starts.append(module.net[-1].weight.detach().clone())
        self.backbones.append(weights(module.net[:-1]).clone())

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append(module.net[-1].weight.detach().clone())

    def on_experience_end(self, trainer, module, experience):
        self.end, self.rest = self.steps[-1], weights(module.net[:-1]).clone()


def fit(*strategies, epochs=1, module=None, **options):
    heads, module = Heads(), make_module() if module is None else module
    data = StreamDataModule(make_stream(), batch_size=8, epochs=epochs)
    trainer = pl.Trainer(max_epochs=3 * epochs, callbacks=[*strategies, heads], **QUIET, **options)
    trainer.fit(module, datamodule=data)
    return module, heads


def test_new_rows_are_the_class_means_of_their_data_and_nothing_else_changes():
    ends = []

    class End(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            ends.append((module.net[-1].weight.detach().clone(), weights(module.net[:-1]).clone()))
            if experience.index == 0:
                train = make_stream()[1].train
                with torch.no_grad():
                    means.append(class_means(module.net[:-1](train.x), train.y, 6)[0])

    means: list[torch.Tensor] = []
    _, heads = fit(HeadInit(match_norm=False), End())
    torch.testing.assert_close(heads.starts[1][2:4], means[0][2:4])
    assert torch.equal(heads.starts[1][[0, 1, 4, 5]], ends[0][0][[0, 1, 4, 5]])
    assert torch.equal(heads.backbones[1], ends[0][1])
    _, matched_heads = fit(HeadInit())
    norms = matched_heads.starts[1].norm(dim=1)
    torch.testing.assert_close(norms[2:4], norms[:2].mean().expand(2))


def test_new_rows_have_no_momentum():
    class Looks(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                state = trainer.optimizers[0].state[module.net[-1].weight]["momentum_buffer"]
                found.extend([state[2:4].abs().max().item(), state[:2].abs().max().item()])

    found: list[float] = []
    fit(HeadInit(), Looks())
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize("over", ["seen", "new"])
def test_a_warm_up_trains_the_new_rows_alone(over):
    _, plain = fit(ExperienceReplay(16))
    _, heads = fit(ExperienceReplay(16), HeadWarmup(20, over=over))
    assert torch.equal(heads.backbones[1], plain.backbones[1])
    changed = (heads.starts[1] != plain.starts[1]).any(dim=1)
    assert changed.tolist() == [False, False, True, True, False, False]
    assert torch.equal(fit(ExperienceReplay(16), HeadWarmup(0))[1].end, plain.end)


class Normalised(UserModule):
    """With BatchNorm before the head."""

    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.BatchNorm1d(16))


def statistics(module):
    norm = module.net[2]
    return torch.cat([norm.running_mean, norm.running_var, norm.num_batches_tracked[None]])


@pytest.mark.parametrize("replay", [True, False])
def test_batch_norm_moves_in_a_warm_up_as_asked(replay):
    class Looks(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            found.append((statistics(module), None))

        def on_experience_start(self, trainer, module, experience):
            assert all(child.training for child in module.modules())
            found.append((statistics(module), module.net[-1].weight.detach().clone()))

    heads = {}
    for batch_norm in ("frozen", "moving"):
        found = []
        torch.manual_seed(0)
        warmup = HeadWarmup(7, batch_norm=batch_norm, batch_size=10)
        fit(*([ExperienceReplay(16)] if replay else []), warmup, Looks(), module=Normalised())
        (before, _), (after, heads[batch_norm]) = found[1:3]
        moved = (before != after)[:-1]
        assert moved.all() if batch_norm == "moving" else not moved.any()
        assert after[-1] - before[-1] == (7 if batch_norm == "moving" else 0)
        # two of three experiences have a warm-up
        assert warmup.extra_updates == 14
    assert torch.equal(heads["frozen"][:2], heads["moving"][:2])
    assert not torch.equal(heads["frozen"][2:4], heads["moving"][2:4])


def test_a_moving_warm_up_equals_a_plain_loop():
    warmup, found = HeadWarmup(3, over="new", batch_norm="moving", batch_size=8, lr=0.5), {}

    class Before(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            if experience.index == 0:
                found["module"] = copy.deepcopy(module.net)

    class After(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                found["ours"] = {name: part.clone() for name, part in module.net.state_dict().items()}

    torch.manual_seed(0)
    fit(warmup, Before(), After(), module=Normalised())
    net, train = found["module"], make_stream()[1].train
    rng = private_rng(0, 60, 1)
    drawn = choose_rows(len(train), 1000, 0, 3, 1)
    net.train()
    for _ in range(3):
        x, y = train.batch(drawn[torch.from_numpy(rng.integers(len(drawn), size=8))])
        logits = net(x)[:, 2:4]
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, y - 2), [*net[-1].parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(net[-1].parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    for name, part in net.state_dict().items():
        torch.testing.assert_close(found["ours"][name], part, rtol=1e-5, atol=1e-6)


def test_extra_updates_are_in_metrics_json_and_survive_a_resume(tmp_path):
    gap = StabilityGap(dir=tmp_path, plot=False)
    fit(HeadWarmup(4), gap)
    assert json.loads((tmp_path / "metrics.json").read_text())["extra_updates"] == {"HeadWarmup": 8}
    again = HeadWarmup(4)
    again.load_state_dict({"extra_updates": 8})
    assert again.extra_updates == 8
    plain = StabilityGap(dir=tmp_path / "plain", plot=False)
    fit(plain)
    assert plain.metrics.extra_updates == {}


def task_free(order):
    """All samples in this order of labels, in two experiences that have the same classes but for the last."""
    generator = torch.Generator().manual_seed(3)
    y = torch.tensor(order)
    x = torch.randn(len(y), 6, generator=generator) + 2 * nn.functional.one_hot(y, 6)
    half = len(y) // 2
    parts = [InMemoryDataset(x[rows], y[rows]) for rows in (slice(half), slice(half, None))]
    experiences = [
        Experience(k, f"e{k}", part, part, classes=tuple(sorted(set(part.y.tolist())))) for k, part in enumerate(parts)
    ]
    return Stream(experiences, name="free", kind="task-free", n_classes=4)


class Sight(Strategy):
    """After HeadInit: the head in each step before its forward, beside the one that HeadInit found."""

    def __init__(self, before):
        self.before, self.rows = before, []

    def transform_batch(self, trainer, module, batch):
        x, y = batch
        with torch.no_grad():
            phi = nn.functional.normalize(module.net[:-1](x), dim=1)
        self.rows.append((self.before[-1], module.net[-1].weight.detach().clone(), phi, y.clone()))
        return batch


class Before(Strategy):
    def __init__(self, seen):
        self.seen = seen

    def transform_batch(self, trainer, module, batch):
        self.seen.append(module.net[-1].weight.detach().clone())
        return batch


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_a_task_free_stream_a_row_is_set_from_the_first_batch_that_holds_its_class(precision):
    seen = []
    sight = Sight(seen)
    # class 3 comes in the second experience, 2 somewhere in the first
    stream = task_free([0, 1] * 15 + [2] * 2 + [0, 1] * 12 + [2, 3] * 4)
    module = make_module(n_classes=4)
    start = weights(module.net[:-1]).clone()
    steps = []

    class Steps(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            steps.append(weights(module.net[:-1]).clone())

    data = StreamDataModule(stream, batch_size=4, epochs=1, seed=1)
    callbacks = [Before(seen), HeadInit(), sight, Steps()]
    pl.Trainer(max_epochs=2, callbacks=callbacks, precision=precision, **QUIET).fit(module, datamodule=data)
    known: set[int] = set()
    set_later = []
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.02, "atol": 0.02}
    for before, after, phi, y in sight.rows:
        new = sorted(set(y.tolist()) - known)
        expected = before.clone()
        if known:
            norm = before[sorted(known)].norm(dim=1).mean()
            for label in new:
                mean = phi[y == label].mean(dim=0)
                expected[label] = mean / mean.norm() * norm
                set_later.append(label)
        torch.testing.assert_close(after, expected, **tolerance)
        kept = [label for label in range(4) if label not in new]
        assert torch.equal(after[kept], before[kept])
        known |= set(new)
    assert {2, 3} <= set(set_later)
    # the body learns in every step, those with new rows too
    assert all(not torch.equal(a, b) for a, b in zip([start, *steps], steps, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["resume", "growth", "processes"])
def test_first_sight_in_a_task_free_stream_keeps_the_promises_of_a_strategy(check):
    def stream():
        known = small_stream()
        return Stream(list(known), name="free", kind="task-free", n_classes=known.n_classes)

    check_strategy(lambda: [ExperienceReplay(16), HeadInit("least_squares")], stream=stream, only=[check])


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_old_rows_are_bitwise_frozen_whatever_the_optimizer_does(decay):
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=decay)
    _, heads = fit(ExperienceReplay(16), FreezeOldRows(), module=module)
    old = heads.starts[1][:2]
    steps = heads.steps[len(heads.steps) // 3 : 2 * len(heads.steps) // 3]
    assert all(torch.equal(rows[:2], old) for rows in steps)
    assert not torch.equal(steps[-1][2:4], heads.starts[1][2:4])
    assert not torch.equal(heads.starts[2], heads.starts[1])


def test_without_restoring_weight_decay_moves_frozen_rows_as_published():
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.5)
    _, heads = fit(FreezeOldRows(restore=False), module=module)
    n = len(heads.steps) // 3
    torch.testing.assert_close(heads.steps[2 * n - 1][:2], (1 - 0.05) ** n * heads.starts[1][:2])


def test_in_the_first_experience_all_of_them_are_the_base_run():
    plain = fit()[1]
    for strategy in (HeadInit(), HeadWarmup(), SoftTargets(), FreezeOldRows()):
        own = fit(strategy)[1]
        n = len(plain.steps) // 3
        assert torch.equal(torch.stack(own.steps[:n]), torch.stack(plain.steps[:n]))


def test_soft_targets_from_the_start_equal_a_plain_loop():
    soft = SoftTargets(start=0)
    torch.manual_seed(0)
    module = make_module(momentum=0.0)
    fit(soft, module=module)
    other = make_module(momentum=0.0)
    data = StreamDataModule(make_stream(), batch_size=8)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for k, loader in enumerate(loaders(data)):
        table, n = torch.zeros(6, 6), torch.zeros(6)
        for x, y in loader:
            p = other(x).softmax(dim=1)
            targets = []
            for own, c in zip(p.detach(), y.tolist(), strict=True):
                r = own.clone()
                if c < 2 * k:
                    r = table[c] / n[c] if n[c] else torch.full((6,), 1 / 6)
                r[own.argmax()] = 1 / 6
                r[c] = 1
                targets.append(r / r.sum())
            for own, c in zip(p.detach(), y.tolist(), strict=True):
                if own.argmax() == c:
                    table[c] += own
                    n[c] += 1
            optimizer.zero_grad()
            (-(torch.stack(targets) * p.log()).sum(dim=1).mean()).backward()
            optimizer.step()
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-4, atol=1e-5)


def loaders(data):
    """The batches of each experience, as a fit gets them."""

    class Epoch:
        current_epoch, world_size, global_rank, overfit_batches = 0, 1, 0, 0
        limit_train_batches, accumulate_grad_batches, callbacks = 1.0, 1, ()

    data.trainer = Epoch()
    for k in range(3):
        Epoch.current_epoch = k
        yield list(data.train_dataloader())


def test_two_that_weigh_the_modules_own_loss_are_refused():
    with pytest.raises(ConfigurationError, match="both give the module's own loss another weight"):
        fit(ExperienceReplay(16, alpha=0.5), SoftTargets())


def test_bad_values():
    for build in (
        lambda: HeadInit("zeros"), lambda: HeadInit(ridge=0.0), lambda: HeadInit(samples=0), lambda: HeadWarmup(-1),
        lambda: HeadWarmup(lr=0.0), lambda: HeadWarmup(over="old"), lambda: HeadWarmup(batch_norm="train"),
        lambda: HeadWarmup(batch_norm="moving", batch_size=1),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            build()


def test_a_head_behind_an_activation_is_refused():
    for strategy in (HeadInit(), HeadWarmup(), FreezeOldRows()):
        module = make_module()
        module.net.append(nn.Tanh())
        with pytest.raises(ConfigurationError, match="last linear layer"):
            fit(strategy, module=module)
