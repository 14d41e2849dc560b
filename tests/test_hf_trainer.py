"""What Lightning's trainer does on a stream, Hugging Face's does too: the same weights, history and resumed runs."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import transformers
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments, get_scheduler

from clkit import ConfigurationError, ResetOptimizer, StabilityGap, StopWhen, StreamDataModule
from clkit.language.hf_trainer import STATE, StreamTraining
from clkit.strategies import DISCO, EMABalance, ExperienceReplay, GDumb, InterpolatedLoRA, MoELoRA, RegLoRA
from clkit.testing import small_instructions, small_language_module, small_stream, small_tokenizer

STRATEGIES = {
    "naive": lambda: [],
    "er": lambda: [ExperienceReplay(8)],
    "ema_balance": lambda: [EMABalance()],
    "reglora": lambda: [RegLoRA(strength=100.0)],
    "ilora": lambda: [InterpolatedLoRA(8)],
    "disco": lambda: [DISCO(0.5), ExperienceReplay(8)],
}
STEPS, BATCHES = 3, 2
"""Optimizer steps of each of two experiences, and batches of each step."""


class Tuning(pl.LightningModule):
    """A user's own module; AdamW whose rate falls linearly after a warm-up, as Hugging Face's does it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, **batch):
        return self.net(**batch)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.0)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_net():
    """A model whose forward draws random numbers, for dropout."""
    torch.manual_seed(1)
    net = small_language_module().net.train()
    net.config.use_cache = False
    for layer in net.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.2
    return net


def make_data(**options):
    return StreamDataModule(small_instructions(2, 16), **{"batch_size": 4, "steps": STEPS, **options})


def gap(folder, **options):
    return StabilityGap(every=1, subset=4, score="token_accuracy", dir=folder, plot=False, **options)


def with_lightning(callbacks, precision="32-true"):
    net, data = make_net(), make_data()
    trainer = pl.Trainer(
        max_epochs=data.total_epochs,
        callbacks=callbacks,
        accumulate_grad_batches=BATCHES,
        gradient_clip_val=0.05,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(Tuning(net), datamodule=data)
    return net


def settings(folder, **options):
    own = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": BATCHES,
        "max_grad_norm": 0.05,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return {"output_dir": str(folder), **own, **options}


def make_trainer(folder, callbacks=(), data=None, net=None, **options):
    trainer = Trainer(net or make_net(), TrainingArguments(**settings(folder, **options)))
    StreamTraining(data or make_data(), callbacks).attach(trainer)
    return trainer


def train(trainer, resume=None):
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def history(folder):
    return (folder / "history.csv").read_text()


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_weights_and_the_history_are_those_of_the_lightning_run(name, tmp_path):
    lightning = with_lightning([*STRATEGIES[name](), gap(tmp_path / "lightning")])
    trainer = make_trainer(tmp_path / "out", [*STRATEGIES[name](), gap(tmp_path / "hugging_face")])
    assert same(train(trainer), lightning)
    assert not same(lightning, make_net())
    assert history(tmp_path / "hugging_face") == history(tmp_path / "lightning")
    assert trainer.state.global_step == 2 * STEPS
    # what the training was given is the user's again
    assert trainer.args.max_steps == -1
    assert not {"training_step", "compute_loss", "get_train_dataloader"} & vars(trainer).keys()


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="its autocast on a CPU keeps casts longer")
def test_mixed_precision_is_that_of_the_lightning_run(tmp_path):
    lightning = with_lightning(STRATEGIES["er"](), "bf16-mixed")
    assert same(train(make_trainer(tmp_path, STRATEGIES["er"](), bf16=True)), lightning)


@pytest.mark.parametrize(
    ("name", "steps"), [("ilora", (STEPS - 1, STEPS)), ("reglora", (STEPS + 1,)), ("disco", (STEPS + 1,))]
)
def test_a_resumed_run_ends_in_the_same_bits(name, steps, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = train(make_trainer(tmp_path / "out", [*STRATEGIES[name](), gap(tmp_path / "gap")], **saving))
    for step in steps:
        folder = tmp_path / f"from_{step}"
        shutil.copytree(tmp_path / "gap", folder)
        resumed = make_trainer(tmp_path / "again", [*STRATEGIES[name](), gap(folder)])
        assert same(train(resumed, str(tmp_path / "out" / f"checkpoint-{step}")), whole)
        assert history(folder) == history(tmp_path / "gap")


def test_an_epoch_of_the_stream_is_saved_and_a_resumed_trainer_finds_it(tmp_path):
    saved = partial(make_trainer, tmp_path, [ExperienceReplay(8)], save_strategy="epoch")
    trainer = saved(max_steps=STEPS + 1)
    with pytest.warns(UserWarning, match="ends before the stream does"):
        train(trainer)
    assert trainer.state.epoch == pytest.approx(1 + 1 / STEPS)
    assert {path.parent.name for path in tmp_path.glob(f"*/{STATE}")} == {
        f"checkpoint-{STEPS}",
        f"checkpoint-{STEPS + 1}",
    }
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS + 1}")
    resumed = saved()
    train(resumed, True)
    assert resumed.state.global_step == 2 * STEPS
    (tmp_path / f"checkpoint-{2 * STEPS}" / STATE).unlink()
    with pytest.raises(ConfigurationError, match=f"has no {STATE}"):
        train(saved(), True)


def test_reporters_get_the_curves_and_what_strategies_log_at_their_steps(tmp_path):
    callbacks = [InterpolatedLoRA(8), gap(tmp_path / "gap")]
    options = {"report_to": "tensorboard", "logging_steps": 2}
    train(make_trainer(tmp_path, callbacks, **options))
    (events,) = tmp_path.rglob("events*")
    seen = EventAccumulator(str(events)).Reload()
    assert [point.step for point in seen.Scalars("train/token_accuracy/E0")] == list(range(2 * STEPS + 1))
    # there is replay from the second experience on
    assert [point.step for point in seen.Scalars("train/ilora/consistency")] == [4, 6]
    assert len(seen.Scalars("train/final/ACC")) == 1


def test_sft_trainer_trains_alike(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # no telemetry
    datasets = pytest.importorskip("datasets")
    lightning = with_lightning([ExperienceReplay(8), gap(tmp_path / "lightning")])
    data = make_data()
    # one that is never read: the trainer insists on one
    first = datasets.Dataset.from_list([dict(data.stream[0].train[0])])
    args = trl.SFTConfig(**settings(tmp_path / "out"))
    trainer = trl.SFTTrainer(make_net(), args, train_dataset=first, processing_class=small_tokenizer())
    StreamTraining(data, [ExperienceReplay(8), gap(tmp_path / "sft")]).attach(trainer)
    # its loss is the same, from sums in another order
    for own, other in zip(train(trainer).parameters(), lightning.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    assert history(tmp_path / "sft") == history(tmp_path / "lightning")


REFUSED = {
    "scaled gradients": {"fp16": True},
    "torch_compile": {"torch_compile": True},
    "of StreamDataModule": {"dataloader_num_workers": 2},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "no"},
    "the stream lasts 6 steps": {"max_steps": 7},
    "ModelCheckpoint needs .*on_validation_end": {"callbacks": [ModelCheckpoint()]},
    "EarlyStopping needs": {"callbacks": [EarlyStopping("loss")]},
    "ResetOptimizer needs the loop": {"callbacks": [ResetOptimizer()]},
    "GDumb needs the loop": {"callbacks": [GDumb()]},
}
REFUSED_DATA = {
    "but StreamDataModule has batch_size=8": {"batch_size": 8},
    "after every 2 batches, .*, but epoch 0 of the stream has 3": {"steps": None, "batch_size": 4, "drop_last": True},
    "stop_when": {"steps": None, "stop_when": StopWhen()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_place_is_refused(message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        train(make_trainer(tmp_path, net=small_language_module().net, **REFUSED[message]))


@pytest.mark.parametrize("message", REFUSED_DATA)
def test_streams_that_the_loop_cannot_go_through_are_refused(message, tmp_path):
    data = StreamDataModule(small_instructions(2, 14), **{"batch_size": 4, "steps": STEPS, **REFUSED_DATA[message]})
    with pytest.raises(ConfigurationError, match=message):
        train(make_trainer(tmp_path, data=data, net=small_language_module().net))


def test_a_stream_of_pairs_is_refused(tmp_path):
    data = StreamDataModule(small_stream(), batch_size=4, steps=STEPS)
    with pytest.raises(ConfigurationError, match="by name, but the stream's is a tuple"):
        train(make_trainer(tmp_path, data=data, net=small_language_module().net))


def test_an_optimizer_made_before_the_strategy_is_refused(tmp_path):
    net = make_net()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    trainer = Trainer(net, TrainingArguments(**settings(tmp_path)), optimizers=(optimizer, None))
    StreamTraining(make_data(), [MoELoRA(experts=2)]).attach(trainer)
    with pytest.raises(ConfigurationError, match="The optimizer does not know"):
        train(trainer)
    with pytest.raises(ConfigurationError, match="A trainer has one StreamTraining"):
        StreamTraining(make_data()).attach(trainer)
