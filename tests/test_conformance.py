"""Every strategy passes the suite that other packages can run on theirs, and the suite can fail."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from torch import nn

from clkit import Strategy, strategies
from clkit.testing import CHECKS, SmallModule, check_strategy

SAMPLE = 6 * 4 + 8  # bytes of an input and a label
WEIGHTS = 4 * (6 * 16 + 16 + 16 * 6 + 6)

STRATEGIES = {
    "naive": (strategies.Naive, 0),
    "cumulative": (strategies.Cumulative, 0),
    "er": (lambda: strategies.ExperienceReplay(16), 16 * SAMPLE),
    "er_balanced": (lambda: strategies.ExperienceReplay(16, buffer="class_balanced", alpha=0.5), 16 * SAMPLE),
    "replay_share": (lambda: strategies.ReplayShare(0.3), 0),
    "agem": (lambda: strategies.AGEM(8, batch_size=8), 3 * 8 * SAMPLE),
    "ewc": (lambda: strategies.EWC(10.0), 2 * WEIGHTS + 4),
    "ewc_online": (lambda: strategies.EWC(10.0, mode="online", decay=0.9, fisher="batch"), 2 * WEIGHTS + 4),
    "lwf": (strategies.LwF, WEIGHTS),
    "ema": (lambda: strategies.EMABalance("paper"), 3 * WEIGHTS),
    "ema_fisher": (lambda: strategies.EMABalance("fisher"), 2 * WEIGHTS),
    "kfpf": (lambda: strategies.KFPF(5, capacity=16, steps=3, distillation=0.5), 16 * (SAMPLE + 6 * 4)),
    "per_task": (strategies.PerTask, 4 * WEIGHTS),
    "l2": (lambda: strategies.L2Anchor(1.0, from_start=True), 2 * WEIGHTS + 8),
    "si": (lambda: strategies.SynapticIntelligence(0.5), 5 * WEIGHTS + 8),
    "mas": (lambda: strategies.MAS(0.1), 2 * WEIGHTS + 8),
    "lwf_bce": (lambda: strategies.LwF(form="bce"), WEIGHTS),
    "features": (lambda: strategies.FeatureDistillation(0.5), WEIGHTS),
    "joint": (strategies.Joint, 0),
    "der": (lambda: strategies.DER(16), 16 * (SAMPLE + 6 * 4)),
    "derpp": (lambda: strategies.DER(16, beta=0.5), 16 * (SAMPLE + 6 * 4)),
    "gem": (lambda: strategies.GEM(8), 3 * 8 * SAMPLE),
    "gdumb": (lambda: strategies.GDumb(24, epochs=None), WEIGHTS),
    "cls_er": (lambda: strategies.CLSER(16), 16 * SAMPLE + 2 * WEIGHTS),
    "ilora": (lambda: strategies.InterpolatedLoRA(16), 16 * SAMPLE + WEIGHTS),
    "weight_average": (strategies.WeightAverage, WEIGHTS),
    "cumulative_average": (lambda: strategies.WeightAverage(rate="cumulative"), WEIGHTS),
    "nmc": (lambda: strategies.NearestMean(24), 24 * SAMPLE),
    "er+average+nmc": (
        lambda: [strategies.ExperienceReplay(16), strategies.WeightAverage(), strategies.NearestMean()],
        16 * SAMPLE + WEIGHTS,
    ),
    "er+lpr": (lambda: [strategies.ExperienceReplay(16), strategies.LPR(every=4)], 16 * SAMPLE + 4 * (7**2 + 17**2)),
    "head_init": (strategies.HeadInit, 0),
    "er+least_squares": (lambda: [strategies.ExperienceReplay(16), strategies.HeadInit("least_squares")], 16 * SAMPLE),
    "er+warmup": (lambda: [strategies.ExperienceReplay(16), strategies.HeadWarmup(5)], 16 * SAMPLE),
    "soft_targets": (strategies.SoftTargets, 4 * (6 * 6 + 6)),
    "freeze_old_rows": (strategies.FreezeOldRows, 4 * 4 * 17),
    "ngm": (lambda: strategies.NGM(0.4), 8),
    "er_agem": (lambda: strategies.ProjectedReplay(8), 3 * 8 * SAMPLE),
    "er_gem": (lambda: strategies.ProjectedReplay(8, projection="gem"), 3 * 8 * SAMPLE),
    "er+fpf": (lambda: [strategies.ExperienceReplay(16), strategies.FPF(steps=3)], 16 * SAMPLE),
}

NEED_LORA = {
    "reglora": (lambda: strategies.RegLoRA(1.0, percent=20), 6 * 16 * 5),
    "olora": (lambda: strategies.OLoRA(0.1, l2=0.01), 3 * 4 * 3 * 6),
    "moelora": (lambda: strategies.MoELoRA(3), 0),
}

UNLIKE_ONE_PROCESS = {
    "er_balanced": "an odd number of replayed samples cannot be shared equally",
    "ewc_online": "fisher='batch' depends on the batch size of a process",
}

PLAN_THE_WHOLE_STREAM = {
    "joint": "it trains on all experiences from the first step",
    "kfpf": "its phases are spread over the steps of the whole stream",
    "er+fpf": "its phase follows the last experience",
}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="pytorch_lightning")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(name, check):
    if check == "processes" and name in UNLIKE_ONE_PROCESS:
        pytest.skip(UNLIKE_ONE_PROCESS[name])
    if check == "growth" and name in PLAN_THE_WHOLE_STREAM:
        pytest.skip(PLAN_THE_WHOLE_STREAM[name])
    build, limit = STRATEGIES[name]
    check_strategy(build, only=[check], state_limit=limit)


def lora_module():
    module = SmallModule()
    config = peft.LoraConfig(r=3, target_modules=["1"], modules_to_save=["3"])
    module.net = peft.get_peft_model(module.net, config)
    return module


def module_with_experts():
    """The fit itself adds none."""
    module = lora_module()
    strategies.MoELoRA(3).split(module)
    return module


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", [*NEED_LORA, "ema", "ilora", "naive"])
def test_strategy_with_lora(name, check):
    if name in NEED_LORA and check == "refusals":
        pytest.skip("it refuses the suite's modules without LoRA")
    build, limit = (NEED_LORA | STRATEGIES)[name]
    module = module_with_experts if name == "moelora" else lora_module
    check_strategy(build, module=module, only=[check], state_limit=limit if name in NEED_LORA else None)


def test_every_public_strategy_is_here():
    def classes(build):
        built = build()
        return {type(one) for one in (built if isinstance(built, list) else [built])}

    covered = set().union(*(classes(build) for build, _ in (STRATEGIES | NEED_LORA).values()))
    # they need texts: tests/test_language_routing.py, tests/test_disco.py
    need_texts = {strategies.InstructionGroups, strategies.DISCO}
    assert covered == {getattr(strategies, name) for name in strategies.__all__} - need_texts


class Forgets(Strategy):
    """Scales the loss by a number that it does not save."""

    def __init__(self):
        self.calls = 0

    def loss_term(self, trainer, module, batch, loss):
        self.calls += 1
        return loss * self.calls / 10


class Peeks(Strategy):
    """Draws from the global random numbers more often while something evaluates."""

    def on_train_batch_end(self, trainer, module, *args):
        if any(type(callback).__name__ == "StabilityGap" for callback in trainer.callbacks):
            torch.rand(1)


class RemembersInItsClass(Strategy):
    calls = 0

    def loss_term(self, trainer, module, batch, loss):
        RemembersInItsClass.calls += 1
        return loss * RemembersInItsClass.calls / 1000


class SeesWhatIsLeft(Strategy):
    """Says that it looks at no batch, and does."""

    reads_batch = False
    scale = 0.0

    def loss_term(self, trainer, module, batch, loss):
        return self.scale * loss

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.scale = float(batch[0].mean())


class Freezes(Strategy):
    def on_fit_end(self, trainer, module):
        module.net[1].weight.requires_grad_(False)


class ReplacesWithoutAWord(Strategy):
    def on_experience_end(self, trainer, module, experience):
        with torch.no_grad():
            module.net[1].weight.mul_(0.5)


class OwnProcess(Strategy):
    def loss_term(self, trainer, module, batch, loss):
        return trainer.global_rank * loss


class Hoards(Strategy):
    def __init__(self):
        self.held = torch.empty(0, 6)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        self.held = torch.cat([self.held, x])

    def state_dict(self):
        return {"held": self.held}

    def load_state_dict(self, state_dict):
        self.held = state_dict["held"]


class RemembersTheWay(Hoards):
    """Says that what it remembers is of the first experience's end."""

    def leaves_first(self, stream):
        return True


class PicklesItself(Strategy):
    def state_dict(self):
        return {"layer": nn.Linear(1, 1)}


class NeedsPairs(Strategy):
    def transform_batch(self, trainer, module, batch):
        return (batch[0] + 0, *batch[1:])


class StepsTwice(Strategy):
    def on_train_batch_end(self, trainer, module, *args):
        trainer.optimizers[0].step()
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += 1


class HalfWeights(Strategy):
    def on_fit_end(self, trainer, module):
        module.bfloat16()


@pytest.mark.parametrize(
    ("strategy", "check"),
    [
        (Forgets, "resume"),
        (Forgets, "growth"),
        (RemembersTheWay, "late"),
        (RemembersInItsClass, "fresh"),
        (SeesWhatIsLeft, "batch"),
        (ReplacesWithoutAWord, "order"),
        (Peeks, "evaluation"),
        (OwnProcess, "processes"),
        (StepsTwice, "accumulation"),
        (HalfWeights, "bf16"),
        (Hoards, "state"),
        (PicklesItself, "state"),
        (Freezes, "untouched"),
        (NeedsPairs, "refusals"),
    ],
)
def test_every_check_can_fail(strategy, check):
    with pytest.raises(Exception, match=check if strategy is not PicklesItself else "weights_only"):
        check_strategy(strategy, only=[check], state_limit=100)


def test_an_unknown_check_is_named():
    with pytest.raises(ValueError, match="resumes"):
        check_strategy(strategies.Naive, only=["resumes"])
