"""Whole runs against a plain PyTorch loop written by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from command_line import two_processes
from plain import QUIET, UserModule, make_module, make_stream, smallest_quadratic, weights
from torch.nn.functional import cross_entropy, logsigmoid

from clkit import ConfigurationError, StabilityGap, Strategy, StreamDataModule
from clkit.strategies import (
    AGEM,
    CLSER,
    DER,
    EWC,
    GEM,
    KFPF,
    MAS,
    Cumulative,
    ExperienceReplay,
    FeatureDistillation,
    GDumb,
    Joint,
    L2Anchor,
    LwF,
    Naive,
    SynapticIntelligence,
)

SETTINGS = {
    "plain": {},
    "accumulation": {"accumulate": 3},
    "clipping": {"clip": 0.5},
    "bf16": {"bf16": True},
    "all": {"accumulate": 2, "clip": 0.5, "bf16": True},
}


def train(strategies, stream, *, epochs=2, batch_size=8, accumulate=1, clip=None, bf16=False, module=None):
    module = make_module() if module is None else module
    data = StreamDataModule(stream, batch_size=batch_size, epochs=epochs)
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=strategies,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision="bf16-mixed" if bf16 else "32-true",
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    return module


class PlainLoop:
    """The bare loop; a method overrides the few places where it differs."""

    def __init__(self, stream, *, epochs=2, batch_size=8, accumulate=1, clip=None, bf16=False):
        self.stream, self.epochs, self.batch_size = stream, epochs, batch_size
        self.accumulate, self.clip, self.bf16 = accumulate, clip, bf16
        self.module = make_module()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.k = self.steps = 0
        batches = [-(-len(experience.train.x) // batch_size) for experience in stream]
        self.total = sum(epochs * -(-n // accumulate) for n in batches)

    def data(self, k):
        return self.stream[k].train.x, self.stream[k].train.y

    def autocast(self):
        # without the cache, as in Lightning: gradients of several forwards are then summed in single precision
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext()

    def loss(self, x, y):
        with self.autocast():
            return cross_entropy(self.module(x), y)

    def before_step(self):
        pass

    def after_batch(self, x, y):
        pass

    def after_step(self):
        pass

    def end(self):
        pass

    def run(self):
        for k in range(len(self.stream)):
            self.k = k
            inputs, targets = self.data(self.k)
            for epoch in range(self.epochs):
                order = np.random.default_rng((4, 0, 1, self.k, epoch)).permutation(len(inputs))
                parts = torch.from_numpy(order).split(self.batch_size)
                for b, rows in enumerate(parts, start=1):
                    x, y = inputs[rows], targets[rows]
                    (self.loss(x, y) / self.accumulate).backward()
                    if b % self.accumulate == 0 or b == len(parts):
                        self.before_step()
                        if self.clip is not None:
                            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    self.after_batch(x, y)
                    if b % self.accumulate == 0 or b == len(parts):
                        self.steps += 1
                        self.after_step()
            self.end()
        return self.module


class PlainCumulative(PlainLoop):
    def data(self, k):
        pairs = [super(PlainCumulative, self).data(i) for i in range(k + 1)]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


class PlainER(PlainLoop):
    capacity = 20

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rng = np.random.default_rng((2, 0, 2))
        self.held: list = []
        self.n = 0

    def replay(self, size):
        size = min(size, len(self.held))
        if size == 0:
            return None
        chosen = self.rng.choice(np.arange(len(self.held)), size, replace=False)
        return tuple(torch.stack(column) for column in zip(*(self.held[i] for i in chosen), strict=True))

    def loss(self, x, y):
        replayed = self.replay(len(x))
        if replayed is not None:
            x, y = torch.cat([x, replayed[0]]), torch.cat([y, replayed[1]])
        return super().loss(x, y)

    def after_batch(self, x, y, *more):
        for sample, u in zip(zip(x, y, *more, strict=True), self.rng.random(len(x)), strict=True):
            j = self.n if self.n < self.capacity else int(u * (self.n + 1))
            if self.n < self.capacity:
                self.held.append(sample)
            elif j < self.capacity:
                self.held[j] = sample
            self.n += 1


class PlainWeightedER(PlainER):
    alpha = 0.3

    def loss(self, x, y):
        replayed = self.replay(len(x))
        new = PlainLoop.loss(self, x, y)
        return self.alpha * new if replayed is None else self.alpha * new + 0.7 * PlainLoop.loss(self, *replayed)


class PlainKFPF(PlainER):
    """Four phases of three steps on the head; the logits come from the training forward."""

    def loss(self, x, y):
        with self.autocast():
            self.logits = self.module(x)
            return cross_entropy(self.logits, y)

    def after_batch(self, x, y):
        samples = zip(x, y, self.logits.detach(), strict=True)
        for sample, u in zip(samples, self.rng.random(len(x)), strict=True):
            j = self.n if self.n < self.capacity else int(u * (self.n + 1))
            if self.n < self.capacity:
                self.held.append(sample)
            elif j < self.capacity:
                self.held[j] = sample
            self.n += 1

    def after_step(self):
        if self.steps not in [j * self.total // 4 for j in (1, 2, 3, 4)]:
            return
        rng = np.random.default_rng((3, 0, 20, [j * self.total // 4 for j in (1, 2, 3, 4)].index(self.steps)))
        head = list(self.module.net[-1].parameters())
        x, y, z = (torch.stack(column) for column in zip(*self.held, strict=True))
        for step in range(3):
            rows = torch.from_numpy(rng.choice(len(x), 10, replace=False))
            with self.autocast():
                logits = self.module(x[rows])
                loss = cross_entropy(logits, y[rows])
            loss = loss + 0.5 * ((logits.float() - z[rows].float()) ** 2).sum() / 10
            grads = torch.autograd.grad(loss, head)
            with torch.no_grad():
                for p, g in zip(head, grads, strict=True):
                    p -= 0.05 * (3 - step) / 3 * g
        for p in head:
            self.optimizer.state.pop(p)


class PlainDER(PlainER):
    alpha, beta, one = 0.3, 0.5, False

    def loss(self, x, y):
        with self.autocast():
            logits = self.module(x)
            loss = cross_entropy(logits, y)
            self.logits = logits.detach()
            first = self.replay(len(x))
            if first is None:
                return loss
            answers = self.module(first[0])
            loss = loss + self.alpha * (answers.float() - first[2].float()).square().mean()
            if self.one:
                return loss + self.beta * cross_entropy(answers, first[1])
            second = self.replay(len(x))
            return loss + self.beta * cross_entropy(self.module(second[0]), second[1])

    def after_batch(self, x, y):
        super().after_batch(x, y, self.logits)


class PlainOneDrawDER(PlainDER):
    one = True


class PlainCLSER(PlainER):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updates = np.random.default_rng((2, 0, 6))
        self.plastic, self.stable = copy.deepcopy(self.module), copy.deepcopy(self.module)
        self.n_steps = self.n_averaged = 0

    def loss(self, x, y):
        replayed = self.replay(len(x))
        if replayed is None:
            return PlainLoop.loss(self, x, y)
        old_x, old_y = replayed
        with self.autocast():
            logits = self.module(torch.cat([x, old_x]))
            with torch.no_grad():
                answers = [self.plastic(old_x), self.stable(old_x)]
            targets = []
            for i, label in enumerate(old_y):
                p, s = (answer[i].float().softmax(0)[label] for answer in answers)
                targets.append(answers[1][i] if s > p else answers[0][i])
            distance = ((logits[len(x) :].float() - torch.stack(targets).float()) ** 2).mean()
            return cross_entropy(logits, torch.cat([y, old_y])) + 0.5 * distance

    def before_step(self):
        self.n_steps += 1

    @torch.no_grad()
    def after_batch(self, x, y):
        super().after_batch(x, y)
        if self.n_steps == self.n_averaged:
            return
        self.n_averaged = self.n_steps
        draws = self.updates.random(2)
        for net, rate, decay, u in zip([self.plastic, self.stable], [0.8, 0.5], [0.8, 0.9], draws, strict=True):
            a = min(decay, 1 - 1 / (self.n_steps + 1))
            for average, p in zip(net.parameters(), self.module.parameters(), strict=True):
                average.copy_(a * average + (1 - a) * p if u < rate else average)

    def run(self):
        super().run()
        return self.stable


class PlainJoint(PlainCumulative):
    def data(self, k):
        return super().data(len(self.stream) - 1)


class PlainGDumb(PlainLoop):
    capacity = 48

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory: list = []
        self.classes: list = []

    def data(self, k):
        if k > 0:
            self.module = make_module()
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        x, y = super().data(k)
        rng = np.random.default_rng((3, 0, 5, k))
        for i in rng.permutation(len(x)).tolist():
            label = y[i].item()
            if label not in self.classes:
                self.classes.append(label)
            held = [entry[1] for entry in self.memory]
            if held.count(label) < self.capacity / len(self.classes):
                if len(held) == self.capacity:
                    largest = max(self.classes, key=held.count)
                    of_largest = [entry for entry in self.memory if entry[1] == largest]
                    self.memory.remove(of_largest[rng.integers(len(of_largest))])
                self.memory.append(((k, i), label))
        chosen = sorted(position for position, _ in self.memory)
        rows = [(self.stream[t].train.x[i], self.stream[t].train.y[i]) for t, i in chosen]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


class PlainGEM(PlainLoop):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memories: list = []

    def before_step(self):
        if not self.memories:
            return
        gradient = np.concatenate([p.grad.double().flatten().numpy() for p in self.module.parameters()])
        references = []
        for x, y in self.memories:
            self.optimizer.zero_grad()
            self.loss(x, y).backward()
            references.append(np.concatenate([p.grad.double().flatten().numpy() for p in self.module.parameters()]))
        old = np.stack(references)
        if (old @ gradient < 0).any():
            gradient = gradient + smallest_quadratic(old @ old.T + 1e-3 * np.eye(len(old)), old @ gradient, 0.5) @ old
        parts = torch.from_numpy(gradient).float().split([p.numel() for p in self.module.parameters()])
        for p, part in zip(self.module.parameters(), parts, strict=True):
            p.grad = part.view_as(p).clone()

    def end(self):
        x, y = self.data(self.k)
        chosen = torch.from_numpy(np.random.default_rng((3, 0, 3, self.k)).permutation(len(x))[:10])
        self.memories.append((x[chosen], y[chosen]))


class PlainAGEM(PlainLoop):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rng = np.random.default_rng((2, 0, 2))
        self.memory: list = []

    def before_step(self):
        if not self.memory:
            return
        x, y = (torch.cat(column) for column in zip(*self.memory, strict=True))
        chosen = torch.from_numpy(self.rng.choice(np.arange(len(x)), 8, replace=False))
        kept = [p.grad.clone() for p in self.module.parameters()]
        self.optimizer.zero_grad()
        self.loss(x[chosen], y[chosen]).backward()
        reference = [p.grad.clone() for p in self.module.parameters()]
        product = sum((g * r).sum() for g, r in zip(kept, reference, strict=True))
        norm = sum((r * r).sum() for r in reference)
        for p, g, r in zip(self.module.parameters(), kept, reference, strict=True):
            p.grad = g - product / norm * r if product < 0 else g

    def end(self):
        x, y = self.data(self.k)
        chosen = np.random.default_rng((3, 0, 3, self.k)).permutation(len(x))[:10]
        self.rng.random(len(chosen))  # the memory's reservoir draws one number for each insertion
        self.memory.append((x[torch.from_numpy(chosen)], y[torch.from_numpy(chosen)]))


class PlainEWC(PlainLoop):
    strength = 10.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.past: list = []

    def loss(self, x, y):
        loss = super().loss(x, y)
        for fisher, anchor in self.past:
            for p, f, a in zip(self.module.parameters(), fisher, anchor, strict=True):
                loss = loss + 0.5 * self.strength * (f * (p - a) ** 2).sum()
        return loss

    def end(self):
        fisher = [torch.zeros_like(p) for p in self.module.parameters()]
        inputs, targets = self.data(self.k)
        for x, y in zip(inputs, targets, strict=True):
            loss = cross_entropy(self.module(x.unsqueeze(0)), y.unsqueeze(0))
            grads = torch.autograd.grad(loss, list(self.module.parameters()))
            for f, g in zip(fisher, grads, strict=True):
                f += g**2 / len(inputs)
        self.past.append((fisher, [p.detach().clone() for p in self.module.parameters()]))


class PlainLwF(PlainLoop):
    teacher = None

    def loss(self, x, y):
        with self.autocast():
            features = self.module.net[:-1](x)
            logits = self.module.net[-1](features)
            loss = cross_entropy(logits, y)
            return loss if self.teacher is None else loss + self.distance(x, features.float(), logits.float())

    def distance(self, x, features, logits):
        old = 2 * self.k
        with torch.no_grad():
            p = torch.log_softmax(self.teacher(x)[:, :old].float() / 2.0, dim=1)
        q = torch.log_softmax(logits[:, :old] / 2.0, dim=1)
        return (p.exp() * (p - q)).sum(dim=1).mean()

    def end(self):
        self.teacher = copy.deepcopy(self.module).eval()


class PlainBinaryLwF(PlainLwF):
    def distance(self, x, features, logits):
        p = torch.sigmoid(self.teacher(x)[:, : 2 * self.k].float()).detach()
        z = logits[:, : 2 * self.k]
        return -(p * logsigmoid(z) + (1 - p) * logsigmoid(-z)).sum(dim=1).mean()


class PlainFeatures(PlainLwF):
    def distance(self, x, features, logits):
        old = self.teacher.net[:-1](x).float().detach()
        return 0.5 * (old - features).square().sum(dim=1).mean()


class PlainL2(PlainLoop):
    anchor = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.begin()

    def begin(self):
        pass

    def loss(self, x, y):
        loss = super().loss(x, y)
        if self.anchor is None:
            return loss
        return loss + 0.5 * sum(
            ((p - a) ** 2).sum() for p, a in zip(self.module.parameters(), self.anchor, strict=True)
        )

    def end(self):
        self.anchor = [p.detach().clone() for p in self.module.parameters()]


class PlainL2FromStart(PlainL2):
    def begin(self):
        self.end()


class PlainSI(PlainLoop):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.importance = [torch.zeros_like(p) for p in self.module.parameters()]
        self.restart()

    def restart(self):
        self.anchor = [p.detach().clone() for p in self.module.parameters()]
        self.path = [torch.zeros_like(p) for p in self.anchor]
        self.gradient = [torch.zeros_like(p) for p in self.anchor]
        self.before = None

    def loss(self, x, y):
        loss = super().loss(x, y)
        params = list(self.module.parameters())
        for total, g in zip(self.gradient, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
            total += g / self.accumulate
        penalties = [(i * (p - a) ** 2).sum() for i, p, a in zip(self.importance, params, self.anchor, strict=True)]
        return loss + 0.5 * sum(penalties)

    def before_step(self):
        self.before = [p.detach().clone() for p in self.module.parameters()]

    def after_batch(self, x, y):
        if self.before is None:
            return
        for w, g, p, b in zip(self.path, self.gradient, self.module.parameters(), self.before, strict=True):
            w -= g * (p.detach() - b)
            g.zero_()
        self.before = None

    def end(self):
        for i, w, p, a in zip(self.importance, self.path, self.module.parameters(), self.anchor, strict=True):
            i += w / ((p.detach() - a) ** 2 + 0.1)
        self.restart()


class PlainMAS(PlainL2):
    def begin(self):
        self.importance = [torch.zeros_like(p) for p in self.module.parameters()]

    def loss(self, x, y):
        loss = PlainLoop.loss(self, x, y)
        if self.anchor is None:
            return loss
        terms = zip(self.importance, self.module.parameters(), self.anchor, strict=True)
        return loss + 0.1 * sum((i * (p - a) ** 2).sum() for i, p, a in terms)

    def end(self):
        inputs, _ = self.data(self.k)
        for x in inputs:
            grads = torch.autograd.grad((self.module(x.unsqueeze(0)) ** 2).sum(), list(self.module.parameters()))
            for i, g in zip(self.importance, grads, strict=True):
                i += g.abs() / len(inputs)
        super().end()


METHODS = {
    "naive": (PlainLoop, lambda: [Naive()]),
    "cumulative": (PlainCumulative, lambda: [Cumulative()]),
    "joint": (PlainJoint, lambda: [Joint()]),
    "er": (PlainER, lambda: [ExperienceReplay(20)]),
    "er_alpha": (PlainWeightedER, lambda: [ExperienceReplay(20, alpha=0.3)]),
    "derpp": (PlainDER, lambda: [DER(20, beta=0.5)]),
    "derpp_one": (PlainOneDrawDER, lambda: [DER(20, beta=0.5, draws="one")]),
    "cls_er": (
        PlainCLSER,
        lambda: [CLSER(20, weight=0.5, plastic_rate=0.8, stable_rate=0.5, plastic_decay=0.8, stable_decay=0.9)],
    ),
    "gdumb": (PlainGDumb, lambda: [GDumb(48, epochs=None)]),
    "gem": (PlainGEM, lambda: [GEM(10)]),
    "agem": (PlainAGEM, lambda: [AGEM(10, batch_size=8)]),
    "ewc": (PlainEWC, lambda: [EWC(10.0)]),
    "lwf": (PlainLwF, lambda: [LwF()]),
    "kfpf": (PlainKFPF, lambda: [KFPF(4, capacity=20, steps=3, batch_size=10, distillation=0.5, reduction="sum")]),
    "lwf_bce": (PlainBinaryLwF, lambda: [LwF(form="bce")]),
    "features": (PlainFeatures, lambda: [FeatureDistillation(0.5, reduction="sum")]),
    "l2": (PlainL2, lambda: [L2Anchor(0.5)]),
    "l2_from_start": (PlainL2FromStart, lambda: [L2Anchor(0.5, from_start=True)]),
    "si": (PlainSI, lambda: [SynapticIntelligence(0.5)]),
    "mas": (PlainMAS, lambda: [MAS(0.1, relative=False)]),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_equal_those_of_the_plain_loop(method, settings):
    plain, strategies = METHODS[method]
    stream = make_stream(per_class=19)
    expected = weights(plain(stream, **settings).run())
    actual = weights(train(strategies(), stream, **settings))
    assert (expected - weights(make_module())).abs().max() > 0.05
    # the two ways to write binary cross-entropy round to neighbouring bf16 numbers now and then
    tolerance = 1e-3 if method == "lwf_bce" and settings.get("bf16") else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_naive_is_bitwise_the_plain_loop():
    stream = make_stream(per_class=19)
    assert torch.equal(weights(train([Naive()], stream)), weights(PlainLoop(stream).run()))


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: ExperienceReplay(0),
        lambda: ExperienceReplay(0, buffer="class_balanced"),
        lambda: DER(0, beta=0.5),
        lambda: DER(alpha=0.0),
        lambda: EWC(0.0),
        lambda: LwF(0.0),
        lambda: LwF(0.0, form="bce"),
        lambda: FeatureDistillation(0.0),
        lambda: L2Anchor(0.0, from_start=True),
        lambda: SynapticIntelligence(0.0),
        lambda: MAS(0.0),
    ],
    ids=["er", "er_balanced", "der_empty", "der", "ewc", "lwf", "lwf_bce", "features", "l2", "si", "mas"],
)
def test_a_strategy_of_weight_zero_is_bitwise_finetuning(strategy):
    stream = make_stream()
    assert torch.equal(weights(train([strategy()], stream)), weights(train([Naive()], stream)))


def test_two_strategies_together_add_up():
    class Both(PlainEWC, PlainER):
        def __init__(self, *args, **kwargs):
            PlainER.__init__(self, *args, **kwargs)
            self.past = []

        def after_batch(self, x, y):
            PlainER.after_batch(self, x, y)

    stream = make_stream(per_class=19)
    expected = weights(Both(stream).run())
    actual = weights(train([ExperienceReplay(20), EWC(10.0)], stream))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_hooks_run_once_an_experience_in_callback_order():
    calls = []

    class Probe(Strategy):
        def __init__(self, name):
            self.name = name

        @property
        def state_key(self):
            return self.name

        def on_experience_start(self, trainer, module, experience):
            calls.append((self.name, "start", experience.index, trainer.global_step))

        def on_experience_end(self, trainer, module, experience):
            calls.append((self.name, "end", experience.index, trainer.global_step))

    train([Probe("a"), Probe("b")], make_stream(2), epochs=3)
    assert calls == [
        ("a", "start", 0, 0),
        ("b", "start", 0, 0),
        ("a", "end", 0, 15),
        ("b", "end", 0, 15),
        ("a", "start", 1, 15),
        ("b", "start", 1, 15),
        ("a", "end", 1, 30),
        ("b", "end", 1, 30),
    ]


def test_the_users_module_is_left_as_it_was():
    module = train([ExperienceReplay(20), EWC(1.0)], make_stream())
    assert "training_step" not in module.__dict__
    assert not module._forward_hooks
    assert all(p.requires_grad for p in module.parameters())


def test_the_users_module_is_left_as_it_was_after_an_error():
    class Failing(UserModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("the user's own bug")
            return super().training_step(batch, batch_idx)

    module = Failing()
    strategy = ExperienceReplay(20)
    with pytest.raises(RuntimeError, match="the user's own bug"):
        train([strategy], make_stream(), module=module)
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("output", ["mapping", "none"])
def test_any_form_of_training_step_output_works(output):
    class Other(UserModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "note": 1} if output == "mapping" else (None if batch_idx == 1 else loss)

    torch.manual_seed(0)
    module = train([ExperienceReplay(20), EWC(1.0)], make_stream(), module=Other())
    assert weights(module).isfinite().all()


def test_a_loss_term_for_manual_optimization_is_refused():
    module = make_module()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="EWC adds a term to the loss, but UserModule optimizes manually"):
        train([EWC()], make_stream(), module=module)


def test_other_data_is_refused():
    trainer = pl.Trainer(max_epochs=1, callbacks=[ExperienceReplay()], **QUIET)
    loader = torch.utils.data.DataLoader(list(zip(torch.zeros(4, 6), torch.zeros(4).long(), strict=True)))
    with pytest.raises(ConfigurationError, match="datamodule=StreamDataModule"):
        trainer.fit(make_module(), loader)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    two_processes("ddp_script.py", folder, *METHODS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_with_the_same_global_batch(method, in_two_processes, tmp_path):
    # 12 samples a class make batches of 8 and no remainder, which two processes would have to fill up
    _, strategies = METHODS[method]
    gap = StabilityGap(dir=tmp_path, plot=False)
    expected = weights(train([*strategies(), gap], make_stream(per_class=12)))
    whole, resumed = (in_two_processes / method / name for name in ("whole", "resumed"))
    torch.testing.assert_close(torch.load(whole / "final.pt"), expected, rtol=2e-5, atol=2e-5)
    history = pd.read_csv(whole / "history.csv")
    pd.testing.assert_frame_equal(history, pd.read_csv(tmp_path / "history.csv"))
    assert torch.equal(torch.load(resumed / "final.pt"), torch.load(whole / "final.pt"))
    assert (resumed / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
