from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, Experience, StabilityGap, Stream, StreamDataModule
from clkit.hidden import hidden_states
from clkit.networks import tiny_vit
from clkit.parameters import swapped, trainable
from clkit.strategies import ExperienceReplay, InterpolatedLoRA, Naive
from clkit.strategies.ilora import consistency_loss


def fit(callbacks, module=None, stream=None, *, batch_size=8, epochs=2, ckpt_path=None, **trainer_settings):
    module = make_module() if module is None else module
    data = StreamDataModule(stream or make_stream(), batch_size=batch_size, epochs=epochs)
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=data.total_epochs, **{**QUIET, **trainer_settings})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


class Record(pl.Callback):
    """The total loss and the logged consistency of each step."""

    def __init__(self):
        self.losses, self.consistency = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.item())

    def on_train_batch_end(self, trainer, *args):
        self.consistency.append(trainer.callback_metrics.get("ilora/consistency", torch.tensor(torch.nan)).item())


@pytest.mark.parametrize(
    ("form", "expected", "gradient"),
    [("mse", 2.0, [-2 / 3, 2 / 3, -4 / 3]), ("one_sided", 5 / 3, [-2 / 3, 0.0, -4 / 3])],
)
def test_worked_example_of_the_consistency(form, expected, gradient):
    fast = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    slow = torch.tensor([2.0, 1.0, 5.0])
    loss = consistency_loss([(fast, slow)], form)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert fast.grad.tolist() == pytest.approx(gradient)
    to_maximum = (torch.maximum(fast, slow) - fast).square().mean()
    assert consistency_loss([(fast, slow)], "one_sided").item() == pytest.approx(to_maximum.item())


@pytest.mark.parametrize(
    ("decay", "expected"),
    [(0.25, [0.75, 1.6875, 2.671875]), (0.9, [0.5, 1.0, 1.5]), (0.999, [0.5, 1.0, 1.5]), (0.0, [1.0, 2.0, 3.0])],
)
def test_worked_example_of_the_slow_learner(decay, expected):
    ilora = InterpolatedLoRA(decay)
    ilora._begin({"w": torch.zeros(1)})
    seen = []
    for value in (1.0, 2.0, 3.0):
        ilora.update({"w": torch.tensor([value])})
        seen.append(ilora.slow["w"].item())
    assert seen == expected


def test_factors_are_averaged_one_by_one():
    ilora = InterpolatedLoRA(0.5)
    ilora._begin({"A": torch.tensor([1.0]), "B": torch.tensor([2.0])})
    ilora.update({"A": torch.tensor([3.0]), "B": torch.tensor([4.0])})
    assert (ilora.slow["A"] * ilora.slow["B"]).item() == 6.0


values = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


@settings(deadline=None)
@given(st.floats(0, 1), st.lists(values, min_size=1, max_size=6))
def test_the_slow_learner_stays_among_the_fast_values(decay, chain):
    ilora = InterpolatedLoRA(decay)
    ilora._begin({"w": torch.tensor(chain[0])})
    for fast in chain[1:]:
        ilora.update({"w": torch.tensor(fast)})
    columns = torch.tensor(chain)
    slack = 1e-4
    assert (ilora.slow["w"] >= columns.min(0).values - slack).all()
    assert (ilora.slow["w"] <= columns.max(0).values + slack).all()
    if decay == 1:
        torch.testing.assert_close(ilora.slow["w"], columns.mean(0), rtol=1e-4, atol=1e-3)


@settings(deadline=None)
@given(values, values)
def test_the_forms_are_ordered_and_add_up(fast, slow):
    fast, slow = torch.tensor(fast), torch.tensor(slow)
    mse = consistency_loss([(fast, slow)])
    one, other = consistency_loss([(fast, slow)], "one_sided"), consistency_loss([(slow, fast)], "one_sided")
    assert 0 <= one <= mse
    torch.testing.assert_close(one + other, mse)
    assert consistency_loss([(torch.maximum(fast, slow), slow)], "one_sided") == 0
    assert consistency_loss([(fast, fast)]) == 0


def test_the_mean_is_over_all_elements_that_are_no_padding():
    fast, slow = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    slow[mask == 0] = torch.inf
    fast.requires_grad_()
    wide = (torch.zeros(4), torch.full((4,), 3.0))
    loss = consistency_loss([(fast, slow), wide], "mse", mask)
    assert loss.item() == pytest.approx((6 * 1 + 4 * 9) / 10)
    loss.backward()
    assert fast.grad.isfinite().all()
    assert consistency_loss([(fast, slow)], "mse", torch.zeros(2, 3)).item() == 0


def test_sums_are_float32():
    fast, slow = torch.zeros(2, dtype=torch.float16), torch.full((2,), 300.0, dtype=torch.float16)
    assert consistency_loss([(fast, slow)]).item() == 90_000


def test_the_first_experience_is_bitwise_finetuning_and_its_loss_untouched():
    stream = make_stream(1)
    ours, plain = Record(), Record()
    fast = fit([InterpolatedLoRA(predict_with="fast"), ours], stream=stream)
    assert torch.equal(weights(fast), weights(fit([Naive(), plain], stream=stream)))
    assert ours.losses == plain.losses


def test_the_total_is_the_formula():
    """Every replay step of a run, recomputed from the weights, the memory and the batch that were there."""
    expected, checked = [], []

    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.datamodule.experience.index == 0:
                return
            memory = copy.deepcopy(ilora.memory)
            x, y = memory.sample(len(batch[0]))
            slow = copy.deepcopy(pl_module.net)
            slow.load_state_dict({name.removeprefix("net."): value for name, value in ilora.slow.items()})
            gap = (slow[:3](x) - pl_module.net[:3](x)).relu()
            own = cross_entropy(pl_module.net(batch[0]), batch[1])
            expected.append((own + cross_entropy(pl_module.net(x), y)).item() / 2 + 0.7 * gap.square().mean().item())

        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.datamodule.experience.index > 0:
                checked.append(loss.item())

    ilora = InterpolatedLoRA(0.9, consistency=0.7, form="one_sided", capacity=30)
    fit([ilora, ByHand()])
    assert len(checked) == 20
    assert checked == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_slow_learner_has_no_dropout_and_equal_learners_no_distance(p):
    class Dropout(UserModule):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net.insert(2, nn.Dropout(p))
            self.modes = []
            self.net[2].register_forward_hook(lambda layer, *_: self.modes.append(layer.training))

    torch.manual_seed(0)
    record, ilora = Record(), InterpolatedLoRA()
    module = fit([ilora, record], Dropout())
    assert module.modes == [True] * 10 + [False, True, True] * 20
    assert all(value == 0 for value in record.consistency[10:]) == (p == 0)
    assert all(torch.equal(ilora.slow[name], value) for name, value in trainable(module).items())


def test_no_sample_is_replayed_in_its_own_step():
    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            replayed = ilora._replayed
            if replayed is not None:
                same = (batch[0][:, None] == replayed[0][None]).all(-1)
                shared.append(same.any().item())

    shared: list = []
    ilora = InterpolatedLoRA(capacity=1000)
    fit([Probe(), ilora], epochs=1)
    assert len(shared) == 10
    assert not any(shared)


def test_slow_steps_are_optimizer_steps_and_insertions_are_batches():
    ilora = InterpolatedLoRA(capacity=10)
    fit([ilora], accumulate_grad_batches=2)
    assert ilora.n_steps == 18  # 5 batches an epoch
    assert ilora.memory.n_seen == 240
    assert len(ilora.memory) == 10
    assert not any(tensor.requires_grad for tensor in ilora.slow.values())


def test_a_second_fit_goes_on_counting():
    ilora = InterpolatedLoRA()
    module = fit([ilora], accumulate_grad_batches=5)
    fit([ilora], module, accumulate_grad_batches=5)
    assert ilora.n_steps == 12


@pytest.mark.parametrize("predict_with", ["slow", "fast"])
def test_what_predicts_is_evaluated_and_in_the_module_at_the_end(predict_with, tmp_path):
    class Both(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            kept.update(fast=weights(pl_module), slow=torch.cat([v.flatten() for v in ilora.slow.values()]))

    kept: dict = {}
    ilora = InterpolatedLoRA(predict_with=predict_with)
    stream = make_stream()
    gaps = [
        StabilityGap(dir=tmp_path / "own", plot=False),
        StabilityGap(dir=tmp_path / "slow", view="slow", plot=False),
        StabilityGap(dir=tmp_path / "live", view="live", plot=False),
    ]
    module = fit([ilora, *gaps, Both()], stream=stream)
    assert torch.equal(weights(module), kept[predict_with])
    assert not torch.equal(kept["fast"], kept["slow"])
    same = "slow" if predict_with == "slow" else "live"
    assert (tmp_path / "own" / "history.csv").read_text() == (tmp_path / same / "history.csv").read_text()
    x, y = stream[0].test.batch(torch.arange(40))
    accuracy = (module(x).argmax(1) == y).float().mean().item()
    assert pd.read_csv(tmp_path / "own" / "history.csv").E0.iloc[-1] == pytest.approx(accuracy)


def test_evaluation_changes_no_state(tmp_path):
    alone, watched = InterpolatedLoRA(), InterpolatedLoRA()
    fit([alone])
    fit([watched, StabilityGap(dir=tmp_path, plot=False)])
    assert alone.state_dict()["memory"]["rng"] == watched.state_dict()["memory"]["rng"]
    assert all(torch.equal(value, watched.slow[name]) for name, value in alone.slow.items())


def test_it_composes_with_another_replay_and_remembers():
    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            sizes.append(len(ilora._replayed[0]) if ilora._replayed is not None else 0)

    sizes: list = []
    ilora = InterpolatedLoRA(batch_size=5)
    fit([ExperienceReplay(20), ilora, Probe()], epochs=1)
    assert sizes == [0] * 5 + [5] * 10
    assert len(ilora.remembered()[0]) == 120
    ilora.memory.clear()
    assert ilora.remembered() is None


def test_it_resumes_bit_identically(tmp_path):
    def run(**settings):
        ilora = InterpolatedLoRA(capacity=16)
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return weights(fit([ilora, checkpoint], enable_checkpointing=True, **settings))

    whole = run()
    for step in (1, 10, 14, 25):
        assert torch.equal(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole), step


def test_a_vision_transformer_learns_with_it():
    class Vit(UserModule):
        def __init__(self):
            super().__init__(lr=0.05)
            self.net = tiny_vit((1, 4, 4), 6, embed_dim=8, depth=2, n_heads=2)

        def forward(self, x):
            return self.net(torch.nn.functional.pad(x, (0, 10)).view(-1, 1, 4, 4))

    names = []
    for layers in ("all", "last", ["blocks.*.attn"]):
        torch.manual_seed(0)
        ilora, record = InterpolatedLoRA(layers=layers), Record()
        module = fit([ilora, record], Vit(), epochs=1)
        names.append(ilora._names)
        assert weights(module).isfinite().all()
        assert all(value > 0 for value in record.consistency[5:])
        assert not any(layer._forward_hooks for layer in module.modules())
    assert names == [["net.blocks.0", "net.blocks.1"], ["net.blocks.1"], ["net.blocks.0.attn", "net.blocks.1.attn"]]


class Texts(torch.utils.data.Dataset):
    """Token sequences with left padding; the labels are the second half."""

    def __init__(self, seed, n=12, length=8, ignored=False):
        rng = np.random.default_rng(seed)
        self.ids = torch.from_numpy(rng.integers(3, 40, (n, length)))
        self.mask = (torch.arange(length) >= torch.from_numpy(rng.integers(0, 4, (n, 1)))).long()
        self.labels = torch.where(torch.arange(length) >= length // 2, self.ids, -100)
        if ignored:
            self.labels[:] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


def texts(ignored=False):
    parts = [Experience(k, f"E{k}", Texts(k, ignored=ignored and k == 0), Texts(10 + k)) for k in range(2)]
    return Stream(parts, name="texts", kind="instruction")


class CausalLM(pl.LightningModule):
    def __init__(self, checkpointing=False, dropout=0.0):
        super().__init__()
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        net = transformers.LlamaForCausalLM(config)
        if checkpointing:
            net.gradient_checkpointing_enable()
            net.enable_input_require_grads()
        lora = peft.LoraConfig(
            r=4, lora_alpha=16, lora_dropout=dropout, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
        )
        self.net = peft.get_peft_model(net, lora)
        self.heads = 0
        self.net.base_model.model.lm_head.register_forward_hook(self.count)

    def count(self, *args):
        self.heads += 1

    def training_step(self, batch):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Gradients(pl.Callback):
    def __init__(self):
        self.chain = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.chain.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.requires_grad]))


def test_adapters_of_a_language_model_learn_and_nothing_else_changes():
    module, record = CausalLM(dropout=0.1), Record()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ilora = InterpolatedLoRA(capacity=20)
    fit([ilora, record], module, texts(), batch_size=4)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(ilora.slow) == {name for name in before if "lora_" in name}
    assert all(value > 0 for value in record.consistency[6:])
    # 6 steps with one forward each, 6 with two; the slow learner's pass stops before the output layer
    assert module.heads == 6 + 6 * 2
    assert module.training


def test_gradient_checkpointing_gives_the_same_gradients():
    chains = []
    for checkpointing in (False, True):
        gradients = Gradients()
        module = CausalLM(checkpointing)
        fit([InterpolatedLoRA(consistency=5.0, capacity=20), gradients], module, texts(), batch_size=4)
        assert module.net.is_gradient_checkpointing == checkpointing
        chains.append(torch.stack(gradients.chain))
    torch.testing.assert_close(chains[1], chains[0], rtol=1e-5, atol=1e-7)


def test_padding_changes_neither_loss_nor_consistency():
    module, other = CausalLM(), InterpolatedLoRA()
    generator = torch.Generator().manual_seed(1)
    slow = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in trainable(module).items()}
    names = [f"net.base_model.model.model.layers.{k}" for k in range(2)]
    found = []
    for padding in (0, 5):
        batch = torch.utils.data.default_collate([Texts(0)[k] for k in range(4)])
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {key: nn.functional.pad(part, (padding, 0), value=fills[key]) for key, part in batch.items()}
        with torch.no_grad(), hidden_states(module, names) as fast:
            loss = module.training_step(batch)
        with torch.no_grad(), swapped(module, slow), hidden_states(module, names) as states:
            module.training_step(batch)
        pairs = [(fast[name], states[name]) for name in names]
        found.append([loss.item(), consistency_loss(pairs, other.form, batch["attention_mask"]).item()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][1] > 0


def test_a_replay_batch_without_labels_leaves_the_loss_of_the_batch():
    class Own(Gradients):
        def on_before_backward(self, trainer, pl_module, loss):
            total.append(loss.item())

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                own.append(pl_module.training_step(batch).item())

    total, own, gradients = [], [], Own()
    stream = texts(ignored=True)
    ilora = InterpolatedLoRA(consistency=0.0, batch_size=2)

    class OnlyOld(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            if experience.index == 1:
                ilora.memory.insert = lambda batch: None

    class Skipping(CausalLM):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss if self.trainer.datamodule.experience.index else loss.nan_to_num() * 0

    module = Skipping()
    fit([ilora, OnlyOld(), gradients], module, stream, batch_size=4)
    assert total[6:] == pytest.approx(own[6:])
    assert all(gradient.isfinite().all() for gradient in gradients.chain)
    assert weights(module).isfinite().all()


def test_other_weights_are_seen_where_autocast_keeps_copies():
    net, x = nn.Linear(3, 3), torch.ones(1, 3)
    other = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = net(x)
        with torch.no_grad(), swapped(net, other):
            assert (net(x) == 0).all()
        assert torch.equal(net(x), before)
        net(x).sum().backward()
    assert (net.weight.grad == 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"decay": 1.5},
        {"consistency": -1.0},
        {"form": "huber"},
        {"layers": "first"},
        {"capacity": -1},
        {"batch_size": 0},
        {"predict_with": "both"},
    ],
)
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        InterpolatedLoRA(**settings)


class Linear(UserModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 6)
        self.idle = nn.Linear(1, 1)


def test_a_network_without_blocks_is_refused_unless_there_is_no_consistency():
    with pytest.raises(ConfigurationError, match="layers="):
        fit([InterpolatedLoRA()], Linear())
    fit([InterpolatedLoRA(consistency=0.0)], Linear())


def test_layers_that_do_not_run_are_refused():
    with pytest.raises(ConfigurationError, match=r"Linear\.training_step ran none of idle"):
        fit([InterpolatedLoRA(layers=["idle"])], Linear())
