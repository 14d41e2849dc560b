"""Whatever a stream holds and a module returns, a run trains to its end or says before its first step why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from clkit import Classifier, ConfigurationError, Experience, StabilityGap, Stream, StreamDataModule
from clkit.data.check import check_samples
from clkit.data.datasets import targets_of
from clkit.evaluation.gradients import GradientNorms
from clkit.strategies import (
    AGEM,
    CLSER,
    DER,
    EWC,
    FPF,
    GEM,
    KFPF,
    LPR,
    MAS,
    NGM,
    Cumulative,
    EMABalance,
    ExperienceReplay,
    FeatureDistillation,
    FreezeOldRows,
    GDumb,
    HeadInit,
    HeadWarmup,
    Joint,
    LwF,
    Naive,
    NearestMean,
    PerTask,
    ProjectedReplay,
    ReplayShare,
    SoftTargets,
    SynapticIntelligence,
    WeightAverage,
)

N = 8


def anything(module, batch):
    return torch.zeros(len(batch[0] if isinstance(batch, (tuple, list)) else next(iter(batch.values()))))


CONSUMERS: dict[str, Callable[[], Any]] = {
    "naive": Naive,
    "accuracy": lambda: StabilityGap(plot=False),
    "accuracy of seen": lambda: StabilityGap(plot=False, mask="seen", zero_shot=False),
    "own score": lambda: StabilityGap(plot=False, score=anything),
    "lazy": lambda: StabilityGap(plot=False, lazy=True),
    "er": lambda: ExperienceReplay(6),
    "replay share": lambda: ReplayShare(0.5),
    "er balanced": lambda: ExperienceReplay(6, buffer="class_balanced", alpha=0.5),
    "agem": lambda: AGEM(3),
    "gem": lambda: GEM(3),
    "ewc": lambda: EWC(1.0),
    "ewc true": lambda: EWC(1.0, fisher="true"),
    "ewc batch": lambda: EWC(1.0, fisher="batch"),
    "si": SynapticIntelligence,
    "mas": MAS,
    "lwf": LwF,
    "lwf bce": lambda: LwF(form="bce"),
    "features": FeatureDistillation,
    "der": lambda: DER(6),
    "der++": lambda: DER(6, beta=0.5, draws="one"),
    "clser": lambda: CLSER(6),
    "ema": EMABalance,
    "joint": Joint,
    "cumulative": Cumulative,
    "gdumb": lambda: GDumb(6),
    "per task": PerTask,
    "fpf": lambda: [ExperienceReplay(6), FPF(select="all", steps=1)],
    "kfpf": lambda: KFPF(1, capacity=6, select="all", steps=1, distillation=1.0),
    "gradients": GradientNorms,
    "weight average": WeightAverage,
    "nmc": lambda: NearestMean(6),
    "lpr": lambda: [ExperienceReplay(6), LPR()],
    "head init": HeadInit,
    "head warm-up": lambda: HeadWarmup(1),
    "soft targets": SoftTargets,
    "frozen rows": FreezeOldRows,
    "ngm": NGM,
    "er + gem": lambda: ProjectedReplay(3, projection="gem"),
}


class Own(pl.LightningModule):
    """A user's module: a small convolution and a head."""

    def __init__(self, outputs: int = 4, **kwargs) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(3, outputs)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class WithTask(Own):
    def forward(self, x, task):
        own = torch.arange(4) // 2 == (task % 2)[:, None]
        return super().forward(x).masked_fill(~own, torch.finfo().min)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], batch[2]), batch[1])


class Regression(Own):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1].view(len(batch[0]), -1))


class Segmentation(Own):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Conv2d(1, 3, 1)


class Autoencoder(Own):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


class Keys(Own):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.body(batch["x"])), batch["y"])


class Detection(Own):
    def training_step(self, batch, batch_idx):
        return self(torch.stack([x for x, _ in batch])).square().mean()


class OneLogit(Own):
    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())


class Norm(Own):
    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(3))


class Two(Own):
    def forward(self, x):
        return super().forward(x), self.body(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])


class NoForward(Own):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


class Growing(Own):
    def __init__(self):
        super().__init__(2)

    def on_train_epoch_start(self):
        wanted = 2 + 2 * self.trainer.current_epoch
        if wanted > self.head.out_features:
            old, self.head = self.head, nn.Linear(3, wanted)
            with torch.no_grad():
                self.head.weight[:2] = old.weight
            self.optimizers().param_groups[0]["params"] = list(self.parameters())


class Items(Dataset):
    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Live(IterableDataset):
    def __iter__(self):
        yield images(0)[0], 0


def images(k: int, n: int = N, size: int = 4) -> torch.Tensor:
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(k))


def labels(k: int, n: int = N) -> torch.Tensor:
    return torch.arange(n) % 2 + 2 * k


def build(make: Callable[[int], Any], kind: Any = "class-incremental", **more: Any) -> Callable[[], Stream]:
    return lambda: Stream.from_datasets(*[[make(k) for k in range(2)]] * 2, kind=kind, **more)


def pairs(k: int) -> TensorDataset:
    return TensorDataset(images(k), labels(k))


def keyed(k: int) -> Items:
    return Items(*({"x": x, "y": y, "file": f"{i}.png"} for i, (x, y) in enumerate(pairs(k))))


def by_hand(make: Callable[[int], Any], **more: Any) -> Callable[[], Stream]:
    return lambda: Stream(
        [Experience(k, f"e{k}", make(k), make(k)) for k in range(2)], name="s", kind="task-free", **more
    )


def encoding(samples: list[Any]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])})


class Renamed(Items):
    """As torchvision's datasets: ``targets`` as they are in the files, labels after a ``target_transform``."""

    def __init__(self, k: int) -> None:
        super().__init__(*pairs(k))
        self.targets = [int(y) * 10 + 7 for _, y in self.samples]


domain = "domain-incremental"
CASES: dict[str, tuple[Callable[[], Stream], Callable[[], pl.LightningModule]]] = {
    "pairs": (build(pairs), Own),
    "pairs, classifier": (build(pairs), lambda: Classifier(Own())),
    "target_transform": (build(Renamed), Own),
    "index": (build(lambda k: TensorDataset(images(k), labels(k), torch.arange(N))), Own),
    "index, classifier": (
        build(lambda k: TensorDataset(images(k), labels(k), torch.arange(N))),
        lambda: Classifier(Own()),
    ),
    "files": (build(lambda k: Items(*((x, y, "file.png") for x, y in pairs(k)))), Own),
    "task": (build(lambda k: TensorDataset(images(k), labels(k), torch.full((N,), k)), "task-incremental"), WithTask),
    "task from 1": (
        build(lambda k: TensorDataset(images(k), labels(k), torch.full((N,), k + 1)), "task-incremental"),
        lambda: Classifier(Own()),
    ),
    "task not taken": (
        build(lambda k: TensorDataset(images(k), labels(k), torch.full((N,), k)), "task-incremental"),
        Own,
    ),
    "no task": (build(pairs, "task-incremental"), WithTask),
    "regression": (build(lambda k: TensorDataset(images(k), torch.randn(N)), domain), lambda: Regression(1)),
    "regression, classifier": (
        build(lambda k: TensorDataset(images(k), torch.randn(N)), domain),
        lambda: Classifier(Own()),
    ),
    "several labels": (build(lambda k: TensorDataset(images(k), torch.ones(N, 4)), domain), lambda: Regression(4)),
    "segmentation": (build(lambda k: TensorDataset(images(k), torch.ones(N, 4, 4).long()), domain), Segmentation),
    "regression of new classes": (build(lambda k: TensorDataset(images(k), torch.randn(N))), lambda: Regression(1)),
    "no labels": (build(lambda k: TensorDataset(images(k)), domain), Autoencoder),
    "strings": (build(lambda k: Items(*((x, "cat") for x in images(k)))), Own),
    "restarting labels": (build(lambda k: TensorDataset(images(k), labels(0))), Own),
    "undeclared labels": (build(pairs, classes=[(0, 1), (2,)]), Own),
    "iterable": (build(lambda k: Live()), Own),
    "empty": (build(lambda k: []), Own),
    "nothing": (lambda: Stream.from_datasets([], []), Own),
    "no test": (lambda: Stream.from_datasets([pairs(0)], [None]), Own),
    "mapping with files": (by_hand(keyed), Keys),
    "mapping, classifier": (by_hand(keyed, n_classes=4), lambda: Classifier(Own())),
    "batch encoding": (by_hand(pairs, collate_fn=encoding), Keys),
    "detection": (by_hand(pairs, collate_fn=lambda samples: [(x, {"boxes": x[0, :2]}) for x, _ in samples]), Detection),
    "arrays": (by_hand(pairs, collate_fn=lambda s: (torch.stack([x for x, _ in s]), np.zeros(len(s)))), Autoencoder),
    "sizes": (build(lambda k: TensorDataset(images(k, size=4 + k), labels(k))), Own),
    "sizes in a batch": (build(lambda k: Items(*((images(i, 1, 4 + i)[0], labels(k)[i]) for i in range(N)))), Own),
    "one sample left": (build(lambda k: TensorDataset(images(k, 9), labels(k, 9))), Norm),
    "growing head": (build(pairs), Growing),
    "small head, classifier": (build(pairs), lambda: Classifier(Own(3))),
    "one logit": (build(lambda k: TensorDataset(images(k), labels(0)), domain), lambda: OneLogit(1)),
    "two outputs": (build(pairs), Two),
    "no forward": (build(pairs), NoForward),
}
TRAINS = {
    "pairs",
    "pairs, classifier",
    "target_transform",
    "index",
    "index, classifier",
    "files",
    "task",
    "task from 1",
}
"""Where nothing may be refused, but:"""
REFUSED = {("task", "lwf bce"), ("segmentation", "features")}

ANY_LOSS = {"naive", "own score", "er", "agem", "gem", "ewc", "ewc batch", "si", "ema", "joint", "cumulative"}
ANY_LOSS |= {"replay share"}
ANY_OUTPUT = ANY_LOSS | {"mas", "features", "der", "der++", "kfpf", "per task"}
ALSO_TRAINS = {
    **dict.fromkeys(["regression", "several labels", "segmentation"], ANY_OUTPUT),
    **dict.fromkeys(["mapping with files", "batch encoding", "no labels", "arrays"], ANY_LOSS),
    "sizes": {"accuracy", "accuracy of seen", "own score", "gem", "ewc", "lwf", "features"},
    "growing head": {"accuracy", "er", "agem", "gem", "der", "der++", "clser", "ema", "lwf", "features", "cumulative"},
    "one sample left": {"er", "clser"},
    "one logit": {"er", "ewc batch", "si", "der"},
    "no forward": ANY_LOSS - {"ewc"},
}
"""Who else may not refuse."""


def outcome(stream: Stream, make_module: Callable[[], pl.LightningModule], consumer: str, folder: Any) -> str:
    torch.manual_seed(0)
    steps = SimpleNamespace(global_step=0)
    try:
        module, data = make_module(), StreamDataModule(stream, batch_size=4)
        steps = pl.Trainer(max_epochs=2, callbacks=CONSUMERS[consumer](), default_root_dir=folder, **QUIET)
        steps.fit(module, datamodule=data)
    except ConfigurationError as error:
        return "refused" if steps.global_step == 0 else f"refused after {steps.global_step} steps: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    done = steps.current_epoch == 2 and all(p.isfinite().all() for p in module.parameters())
    return "trained" if done else "no training"


@pytest.mark.parametrize("case", CASES)
def test_every_consumer_trains_to_the_end_or_refuses_before_the_first_step(case, tmp_path):
    make_stream, make_module = CASES[case]
    try:
        stream = make_stream()
    except ConfigurationError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {consumer: outcome(stream, make_module, consumer, tmp_path) for consumer in CONSUMERS}
    trains = set(found) if case in TRAINS else ALSO_TRAINS.get(case, set())
    trains = {name for name in trains if (case, name) not in REFUSED}
    wrong = {name: what for name, what in found.items() if what != "trained" and (name in trains or what != "refused")}
    assert wrong == {}


def fit(stream, module, *callbacks, **settings):
    data = StreamDataModule(stream, batch_size=4)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=list(callbacks), **QUIET, **settings)
    trainer.fit(module, datamodule=data)
    return trainer


def test_classes_are_those_that_samples_have_whatever_targets_says():
    stream = Stream.from_datasets(*[[Renamed(k) for k in (1, 0)]] * 2)
    assert [(e.classes, stream.n_classes) for e in stream] == [((2, 3), 4), ((0, 1), 4)]
    part = torch.utils.data.Subset(Renamed(1), [5, 2, 7])
    assert targets_of(part).tolist() == [int(part[i][1]) for i in range(3)]


def test_reading_labels_and_setting_up_draws_no_global_random_numbers():
    class Noisy(Renamed):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(()) * float(np.random.rand()), y

    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    stream = Stream.from_datasets(*[[Noisy(k) for k in range(2)]] * 2)
    check_samples(stream, None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("what", ["index", "files"])
def test_what_stands_behind_the_label_changes_no_number(what, tmp_path):
    def run(case, name):
        torch.manual_seed(0)
        gap = StabilityGap(dir=tmp_path / name, plot=False)
        module = Classifier(Own())
        fit(CASES[case][0](), module, LwF(), DER(6, beta=0.5), EWC(5.0, fisher="true"), gap)
        return gap.history.scores, module.state_dict()

    (scores, state), (others, other) = run("pairs", "a"), run(what, "b")
    np.testing.assert_array_equal(scores, others)
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_strings_stay_beside_their_samples_in_memory_and_in_its_state():
    x = images(0)
    data = Items(*({"x": x[i], "y": torch.tensor(i % 2), "file": f"{i}.png"} for i in range(N)))
    stream = Stream([Experience(0, "e", data, data)], name="s", kind="task-free")
    replay, again = ExperienceReplay(5), ExperienceReplay(5)
    trainer = fit(stream, Keys(), replay)
    again.load_state_dict(replay.state_dict())
    for memory in (replay.remembered(), again.remembered()):
        assert len(memory["file"]) == len(set(memory["file"])) == 5
        assert all(torch.equal(x[int(name[0])], kept) for name, kept in zip(memory["file"], memory["x"], strict=True))
    assert trainer.global_step == 2


def test_under_the_experiences_mask_a_class_that_comes_back_competes_with_those_of_its_own_experience(tmp_path):
    class Fixed(Own):
        def forward(self, x):
            # 2 is the largest logit, then 1, then 0
            return x.flatten(1)[:, :3] * 0 + torch.arange(3.0) + self.head.bias.sum() * 0

        def training_step(self, batch, batch_idx):
            return self.head.bias.sum() * 0

    sets = [TensorDataset(images(k), torch.tensor(labels)) for k, labels in enumerate([[0, 1] * 4, [1, 2] * 4])]
    stream = Stream.from_datasets(sets, sets)
    gap = StabilityGap(dir=tmp_path, plot=False, mask="experience")
    fit(stream, Fixed(), gap)
    # in experience 0 the label 1 beats 0 and 2 does not compete; in experience 1 it loses to 2
    assert gap.history.select("end").scores[-1].tolist() == [0.5, 0.5]
    assert np.nanmax(np.abs(gap.history.scores - 0.5)) == 0


def test_lwf_asks_a_module_that_needs_the_task_what_one_that_does_not_is_asked_without():
    class Heads(WithTask):
        """Logits of each task from a head of its own, the others' not at all."""

        def forward(self, x, task):
            return self.head(self.body(x)).masked_fill(torch.arange(4) // 2 != task[:, None], 0.0)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    class Whole(Heads):
        def forward(self, x, task=None):
            return self.head(self.body(x))

    def run(kind):
        torch.manual_seed(0)
        module = kind()
        fit(CASES["task"][0](), module, LwF(5.0))
        return module.state_dict()

    needs, whole = run(Heads), run(Whole)
    assert all(torch.equal(needs[key], whole[key]) for key in needs)


def test_der_compares_the_logits_that_a_growing_head_had():
    torch.manual_seed(0)
    der, module = DER(N * 2), Growing()
    fit(CASES["growing head"][0](), module, der)
    (_, y), stored = der.buffer.contents()
    known = stored > torch.finfo(stored.dtype).min
    assert known.sum(dim=1).tolist() == torch.where(y < 2, 2, 4).tolist()
    assert module.head.out_features == stored.shape[1] == 4


@pytest.mark.parametrize(
    ("case", "consumer", "message"),
    [
        ("one logit", "accuracy", r"logits \[B, C\] of at least two classes"),
        ("one logit", "ewc", "fisher='batch'"),
        ("regression", "accuracy", "one class a sample, and labels are float32"),
        ("regression, classifier", "naive", "LightningModule of your own"),
        ("regression of new classes", "naive", "kind='domain-incremental' for regression"),
        ("no task", "naive", r"samples \(x, y, task\)"),
        ("task not taken", "accuracy", r"forward\(x\) does not take \(x, task\)"),
        ("restarting labels", "naive", "number the classes of the whole stream"),
        ("undeclared labels", "naive", r"include 3, but its classes are \(2,\)"),
        ("strings", "naive", "number the labels"),
        ("iterable", "naive", "map-style"),
        ("empty", "naive", "is empty"),
        ("nothing", "naive", "no experience"),
        ("no test", "naive", "no test samples; give it some"),
        ("sizes", "er", "resize or pad them"),
        ("sizes", "joint", "resize or pad them"),
        ("sizes in a batch", "naive", "resize or pad them"),
        ("one sample left", "naive", "drop_last=True"),
        ("small head, classifier", "naive", "build it with 4 outputs"),
        ("growing head", "si", "build the network with all its outputs"),
        ("two outputs", "lwf", "return a tensor"),
        ("no forward", "lwf", "has no forward"),
        ("detection", "er", "one entry a sample"),
    ],
)
def test_a_refusal_is_one_sentence_that_names_the_remedy(case, consumer, message, tmp_path):
    make_stream, make_module = CASES[case]
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(make_stream(), make_module(), CONSUMERS[consumer](), default_root_dir=tmp_path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_task_labels_are_compared_with_the_experiences():
    sets = [TensorDataset(images(k), labels(k), torch.full((N,), k)) for k in range(2)]
    wrong = [sets[0], TensorDataset(images(1), labels(1), torch.tensor([1] * (N - 1) + [0]))]
    with pytest.raises(ConfigurationError, match="is 0, 1, but the experience's task is 1"):
        fit(Stream.from_datasets(wrong, sets, kind="task-incremental"), WithTask())
