"""What a new user gets: each strategy with its defaults, is no worse than no strategy."""

from __future__ import annotations

import functools
import statistics

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from plain import QUIET

from clkit.run.jobs import task as task  # registers the resolver of run names
from clkit.run.plugins import choices

NEED_MORE = {"fpf": "er,fpf", "lpr": "er,lpr"}
# those that need texts or LoRA, and what predicts with other weights for each experience
LEFT_OUT = {"disco", "instruction_groups", "moelora", "olora", "reglora", "per_task"}
# 100 samples of each permutation are all that it learns from, and in two experiences little is forgotten
KNOWN_WORSE = {("gdumb", "permuted_digits")}
STREAMS = {
    "split_digits": ["data.epochs=3"],
    "permuted_digits": ["scenario.n_experiences=2", "data.epochs=2"],
}
ADAM = ["model.optimizer._target_=torch.optim.Adam", "model.optimizer.lr=0.001", "~model.optimizer.momentum"]
NAMES = sorted({choice.name for choice in choices("strategy") if choice.origin == "clkit"} - LEFT_OUT)


def final_accuracy(scenario: str, strategy: str, seed: int = 0, extra: tuple[str, ...] = ()) -> float:
    """Accuracy in percent after the last experience, all experiences counting the same; weights must be finite."""
    overrides = [f"scenario={scenario}", f"strategy=[{strategy}]", f"seed={seed}", "folder=unused", *extra]
    with initialize_config_module("clkit.conf", version_base="1.3"):
        config = compose("train", overrides=[*STREAMS[scenario], *overrides])
    pl.seed_everything(seed, verbose=False)
    stream = instantiate(config.scenario)
    data = instantiate(config.data, _partial_=True)(stream)
    module = instantiate(config.model, **stream.model_arguments)
    callbacks = [instantiate(entry) for entry in config.strategy.values()]
    pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in module.parameters()), strategy
    module.eval()
    with torch.no_grad():
        batches = [experience.test.batch(torch.arange(len(experience.test))) for experience in stream]
        return 100 * statistics.mean(float((module(x).argmax(1) == y).float().mean()) for x, y, *_ in batches)


@functools.cache
def naive(scenario: str, extra: tuple[str, ...] = ()) -> tuple[float, float]:
    """Mean and standard deviation over three seeds."""
    found = [final_accuracy(scenario, "naive", seed, extra) for seed in range(3)]
    return statistics.mean(found), statistics.stdev(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scenario", STREAMS)
@pytest.mark.parametrize("name", NAMES)
def test_no_default_fails(name, scenario):
    mean, deviation = naive(scenario)
    if (name, scenario) in KNOWN_WORSE:
        mean = 20.0
    assert final_accuracy(scenario, NEED_MORE.get(name, name)) >= mean - 2 * max(deviation, 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["kfpf", "fpf"])
def test_no_default_fails_beside_adam(name):
    mean, deviation = naive("split_digits", tuple(ADAM))
    assert final_accuracy("split_digits", NEED_MORE.get(name, name), extra=tuple(ADAM)) > mean + 2 * deviation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["ewc", "si", "mas", "l2"])
def test_no_strength_diverges_on_permuted_digits(strategy):
    assert final_accuracy("permuted_digits", strategy, extra=(f"strategy.{strategy}.strength=1000",)) > 20
