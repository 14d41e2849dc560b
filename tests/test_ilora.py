from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import pytorch_lightning as pl
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_module, make_stream, weights
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from clkit import ConfigurationError, Experience, StabilityGap, Stream, StreamDataModule
from clkit.method.hidden_states import capture, find_blocks
from clkit.metrics.history import History
from clkit.strategies import ExperienceReplay, InterpolatedLoRA, Naive
from clkit.strategies.ilora import consistency


def fit(callbacks, module=None, stream=None, epochs=2, **options):
    module = make_module() if module is None else module
    data = StreamDataModule(make_stream() if stream is None else stream, batch_size=8, epochs=epochs)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(module, datamodule=data)
    return module


def test_consistency_by_hand():
    fast, slow = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([2.0, 1.0, 5.0])
    value = consistency([fast], [slow])
    value.backward()
    assert float(value) == pytest.approx(2.0)
    assert fast.grad.tolist() == pytest.approx([-2 / 3, 2 / 3, -4 / 3])
    fast.grad = None
    value = consistency([fast], [slow], "one_sided")
    value.backward()
    assert float(value) == pytest.approx(5 / 3)
    assert fast.grad.tolist() == pytest.approx([-2 / 3, 0, -4 / 3])
    assert 0.5 * (1.2 + 0.8) + float(value) == pytest.approx(2.6666667)


states = st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4)


@given(states, states)
def test_one_sided_is_at_most_symmetric_and_both_roles_add_up(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    whole, one, other = (
        float(consistency([x], [y], f)) for x, y, f in ((a, b, "mse"), (a, b, "one_sided"), (b, a, "one_sided"))
    )
    assert 0 <= one <= whole + 1e-4
    assert one + other == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert float(consistency([a], [a])) == float(consistency([a], [a], "one_sided")) == 0
    assert float(consistency([torch.maximum(a, b)], [b], "one_sided")) == 0


@pytest.mark.parametrize(
    ("decay", "ramp", "expected"),
    [
        (0.25, True, [0.75, 1.6875, 2.671875]),
        (0.9, True, [0.5, 1.0, 1.5]),
        (0.999, True, [0.5, 1.0, 1.5]),
        (0.0, True, [1.0, 2.0, 3.0]),
        (1.0, False, [0.0, 0.0, 0.0]),
        (0.9, False, [0.1, 0.29, 0.561]),
    ],
)
def test_published_averages(decay, ramp, expected):
    strategy = InterpolatedLoRA(decay=decay, ramp=ramp)
    strategy.slow = {"w": torch.zeros(1)}
    found = []
    for value in (1.0, 2.0, 3.0):
        strategy.interpolate({"w": torch.tensor([value])})
        found.append(float(strategy.slow["w"]))
    assert found == pytest.approx(expected)


@given(st.floats(0, 1), st.booleans(), st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=6))
def test_slow_weights_stay_among_the_fast_ones_seen(decay, ramp, fast):
    strategy = InterpolatedLoRA(decay=decay, ramp=ramp)
    strategy.slow = {"w": torch.zeros(1)}
    for count, value in enumerate(fast, start=1):
        strategy.interpolate({"w": torch.tensor([value])})
        seen = [0.0, *fast[:count]]
        assert min(seen) - 1e-4 <= float(strategy.slow["w"]) <= max(seen) + 1e-4


def test_factors_are_averaged_one_by_one():
    strategy = InterpolatedLoRA(decay=0.5, ramp=False)
    strategy.slow = {"A": torch.tensor([1.0]), "B": torch.tensor([2.0])}
    strategy.interpolate({"A": torch.tensor([3.0]), "B": torch.tensor([4.0])})
    assert float(strategy.slow["A"] * strategy.slow["B"]) == 6


def plain_loop(form="mse", gamma=0.7, decay=0.9, capacity=20, epochs=2, accumulate=1):
    module, slow = make_module(), make_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    rng, held, n, k = np.random.default_rng((2, 0, 2)), [], 0, 0

    def hidden(net, x):
        return net[1](x.flatten(1))

    for index, experience in enumerate(make_stream()):
        inputs, labels = experience.train.x, experience.train.y
        for epoch in range(epochs):
            order = torch.from_numpy(np.random.default_rng((4, 0, 1, index, epoch)).permutation(len(inputs)))
            parts = order.split(8)
            for b, rows in enumerate(parts, start=1):
                x, y = inputs[rows], labels[rows]
                loss = cross_entropy(module(x), y)
                if index > 0:
                    chosen = rng.choice(np.arange(len(held)), min(len(x), len(held)), replace=False)
                    mx, my = torch.stack([held[i][0] for i in chosen]), torch.stack([held[i][1] for i in chosen])
                    apart = hidden(slow.net, mx).detach() - hidden(module.net, mx)
                    cons = (apart.clamp(min=0) if form == "one_sided" else apart).pow(2).mean()
                    loss = 0.5 * (loss + cross_entropy(module(mx), my)) + gamma * cons
                (loss / accumulate).backward()
                if b % accumulate == 0 or b == len(parts):
                    optimizer.step()
                    optimizer.zero_grad()
                    k += 1
                    rate = min(1 - 1 / (k + 1), decay)
                    with torch.no_grad():
                        for p, q in zip(slow.parameters(), module.parameters(), strict=True):
                            p.copy_(rate * p + (1 - rate) * q)
                for sample, u in zip(zip(x, y, strict=True), rng.random(len(x)), strict=True):
                    j = n if n < capacity else int(u * (n + 1))
                    if n < capacity:
                        held.append(sample)
                    elif j < capacity:
                        held[j] = sample
                    n += 1
    return module, slow


@pytest.mark.parametrize("form", ["mse", "one_sided"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_learners_equal_those_of_a_plain_loop(form, accumulate):
    fast, slow = plain_loop(form, accumulate=accumulate)
    settings = {"capacity": 20, "decay": 0.9, "gamma": 0.7, "form": form}
    strategy = InterpolatedLoRA(**settings, predict_with="fast")
    actual = fit([strategy], accumulate_grad_batches=accumulate)
    torch.testing.assert_close(weights(actual), weights(fast), rtol=2e-4, atol=2e-5)
    held = torch.cat([tensor.flatten() for tensor in strategy.slow.values()])
    torch.testing.assert_close(held, weights(slow), rtol=2e-4, atol=2e-5)
    predicts = fit([InterpolatedLoRA(**settings)], accumulate_grad_batches=accumulate)
    torch.testing.assert_close(weights(predicts), held, rtol=1e-6, atol=1e-6)


def test_the_first_experience_is_bitwise_plain_and_without_consistency_it_is_weighted_replay():
    one = make_stream(1)
    assert torch.equal(
        weights(fit([InterpolatedLoRA(predict_with="fast")], stream=one)), weights(fit([Naive()], stream=one))
    )
    ilora = fit([InterpolatedLoRA(capacity=20, gamma=0.0, predict_with="fast")])

    class LaterReplay(ExperienceReplay):
        def transform_batch(self, trainer, module, batch):
            if trainer.datamodule.experience.index == 0:
                self._replayed = None
                return batch
            return super().transform_batch(trainer, module, batch)

    replay = fit([LaterReplay(20, alpha=0.5, scale_first_task=False)])
    torch.testing.assert_close(weights(ilora), weights(replay))


def test_no_sample_is_replayed_in_its_own_step():
    class Watch(InterpolatedLoRA):
        def transform_batch(self, trainer, module, batch):
            super().transform_batch(trainer, module, batch)
            if self._replayed is not None:
                seen = {tuple(x.tolist()) for x in batch[0]}
                assert not seen & {tuple(x.tolist()) for x in self._replayed[0]}
            return batch

    fit([Watch(capacity=100)], epochs=1)


def test_evaluation_uses_the_slow_learner_unless_told_otherwise(tmp_path):
    runs = {
        "default": ([InterpolatedLoRA(20)], None),
        "slow": ([InterpolatedLoRA(20)], "slow"),
        "live": ([InterpolatedLoRA(20)], "live"),
        "fast": ([InterpolatedLoRA(20, predict_with="fast")], None),
    }
    scores = {}
    for name, (strategies, view) in runs.items():
        gap = StabilityGap(dir=tmp_path / name, plot=False, view=view, name=name)
        fit([*strategies, gap])
        scores[name] = History.read(tmp_path / name / "history.csv").scores
        assert json.loads((tmp_path / name / "metrics.json").read_text())["view"] == (
            "slow" if name in ("default", "slow") else "live"
        )
    np.testing.assert_array_equal(scores["default"], scores["slow"])
    np.testing.assert_array_equal(scores["live"], scores["fast"])
    assert not np.array_equal(scores["slow"], scores["live"], equal_nan=True)


def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class LanguageModule(pl.LightningModule):
    """A user's own module around a PeftModel of transformers; batches are mappings."""

    def __init__(self, checkpointing=False):
        super().__init__()
        net = llama()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
            net.enable_input_require_grads()
        self.net = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)


def texts(n=16, length=8, pad=0):
    generator = torch.Generator().manual_seed(0)

    def task(k):
        found = []
        for _ in range(n):
            ids = torch.randint(1, 32, (length,), generator=generator) + 31 * (k % 2)
            real = torch.ones(length, dtype=torch.int64)
            labels = ids.clone()
            labels[: length // 2] = -100
            zeros = torch.zeros(pad, dtype=torch.int64)
            found.append(
                {
                    "input_ids": torch.cat([zeros, ids]),
                    "attention_mask": torch.cat([zeros, real]),
                    "labels": torch.cat([zeros - 100, labels]),
                }
            )
        return found

    experiences = [Experience(k, f"T{k}", task(k), task(k)) for k in range(2)]
    return Stream(experiences, name="texts", kind="instruction")


def language(**options):
    torch.manual_seed(0)
    return LanguageModule(**options)


def test_a_language_model_with_lora_learns_and_its_backbone_stays():
    before = {name: p.clone() for name, p in language().named_parameters()}
    strategy = InterpolatedLoRA(16)
    module = fit([strategy], language(), texts())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert set(strategy.slow) == {name for name, p in module.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_gives_the_same_weights():
    plain = fit([InterpolatedLoRA(16)], language(), texts())
    checkpointed = fit([InterpolatedLoRA(16)], language(checkpointing=True), texts())
    for (name, p), (_, q) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_changes_nothing():
    plain = fit([InterpolatedLoRA(16)], language(), texts())
    padded = fit([InterpolatedLoRA(16)], language(), texts(pad=5))
    for (name, p), (_, q) in zip(plain.named_parameters(), padded.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-4, msg=name)


def test_replayed_samples_whose_labels_are_all_ignored_do_no_harm():
    stream = texts()
    for sample in stream[0].train:
        sample["labels"].fill_(-100)
    # the first task then has no loss at all, so only the second one is trained
    module = language()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx).nan_to_num()
    fit([InterpolatedLoRA(16)], module, stream)
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("network", "number", "kind"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=3), 3, "Block"),
        (lambda: timm.create_model("resnet10t"), 4, "BasicBlock"),
        (lambda: torchvision.models.resnet18(), 8, "BasicBlock"),
        (lambda: torchvision.models.vgg11(), 10, "Linear"),
        (lambda: make_module().net, 1, "Linear"),
        (llama, 2, "LlamaDecoderLayer"),
        (lambda: language(), 2, "LlamaDecoderLayer"),
        (
            lambda: BertForSequenceClassification(
                BertConfig(
                    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=50
                )
            ),
            3,
            "BertLayer",
        ),
    ],
)
def test_blocks_are_found_without_help(network, number, kind):
    net = network()
    found = find_blocks(net)
    assert len(found) == number
    assert type(found[-1]).__name__ == kind
    assert find_blocks(net, "last") == found[-1:]


def test_blocks_by_pattern_and_what_to_do_without_any():
    net = make_module()
    assert find_blocks(net, ["net.[13]"]) == [net.net[1], net.net[3]]
    with pytest.raises(ConfigurationError, match="'blocks.*' matches no module"):
        find_blocks(net, ["blocks.*"])
    with pytest.raises(ConfigurationError, match="layers='first'"):
        find_blocks(net, "first")
    with pytest.raises(ConfigurationError, match="No blocks were found in Linear"):
        find_blocks(nn.Linear(3, 2))


def test_a_stopped_capture_leaves_out_the_rest():
    ran = []
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    net[3].register_forward_hook(lambda *args: ran.append(1))
    with capture([net[0], net[2]], stop=True) as found:
        net(torch.ones(1, 3))
    assert len(found) == 2
    assert ran == []
    net(torch.ones(1, 3))
    assert len(found) == 2


def test_the_slow_learner_starts_as_a_copy_and_then_moves():
    strategy, module = InterpolatedLoRA(decay=0.99), make_module()
    start = copy.deepcopy(dict(module.named_parameters()))
    strategy.on_train_start(None, module)
    assert all(torch.equal(strategy.slow[name], start[name]) for name in start)
    assert all(strategy.slow[name].data_ptr() != p.data_ptr() for name, p in module.named_parameters())
    fit([strategy], module)
    assert all(not torch.equal(strategy.slow[name], start[name]) for name in start)


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity": -1},
        {"decay": 1.1},
        {"gamma": -1.0},
        {"form": "l1"},
        {"predict_with": "both"},
        {"batch_size": 0},
    ],
)
def test_bad_values_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        InterpolatedLoRA(**settings)


def test_clearing_the_memory():
    strategy = InterpolatedLoRA(20)
    fit([strategy])
    assert len(strategy.remembered()[0]) == 20
    strategy.buffer.clear()
    assert strategy.remembered() is None
    assert len(strategy.buffer) == 0


def test_reentrant_checkpointing_is_refused():
    class Reentrant(UserModule):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x):
            def inner(x):
                return self.first(x).relu()

            return self.second(torch.utils.checkpoint.checkpoint(inner, x.requires_grad_(), use_reentrant=True))

    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match="use_reentrant=False"):
        fit([InterpolatedLoRA(20, layers=["first"])], Reentrant())
