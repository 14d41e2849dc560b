from __future__ import annotations

import peft
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, UserModule, make_stream
from torch import nn
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, StreamDataModule
from clkit.method.adapters import lora_layers, merge_adapters
from clkit.rng import private_rng
from clkit.strategies import EWC, EMABalance, ExperienceReplay, Naive, RegLoRA
from clkit.strategies.reglora import Penalty, Positions, prefers_sparse


class LoraModule(UserModule):
    """A user's own module around a PeftModel."""

    def __init__(self, dropout=0.0):
        super().__init__()
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6))
        config = peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["0", "2"], modules_to_save=["4"], lora_dropout=dropout
        )
        self.net = peft.get_peft_model(net, config)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


def lora_module(**kwargs):
    torch.manual_seed(0)
    return LoraModule(**kwargs)


def fit(callbacks, module=None, **settings):
    module = lora_module() if module is None else module
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


B1, A1 = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0, -2.0, 3.0]])
B2, A2 = torch.tensor([[0.5], [1.0]]), torch.tensor([[0.2, -0.4, 0.6]])
B3, A3 = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -1.0, 0.5]])


def test_published_example():
    first = Positions.largest((B1 @ A1).abs(), 3)
    assert first.flat.tolist() == [1, 2, 5]  # (0, 1), (0, 2), (1, 2)
    second = Positions.largest((B2 @ A2).abs(), 3)
    assert second.flat.tolist() == [2, 4, 5]
    union, multiset = first.joined(second, count=False), first.joined(second, count=True)
    assert union.flat.tolist() == multiset.flat.tolist() == [1, 2, 4, 5]
    assert union.counts.tolist() == [1, 1, 1, 1]
    assert multiset.counts.tolist() == [1, 2, 1, 2]
    for sparse in (False, True):
        value, b, a = Penalty(first, sparse, torch.device("cpu"))(B2, A2)
        assert float(value) == pytest.approx(1.1 / 3)
        assert float(2500 * value) == pytest.approx(916.6667, rel=1e-6)
        assert b.flatten().tolist() == pytest.approx([1 / 3, 0.2])
        assert a.flatten().tolist() == pytest.approx([0, -1 / 6, 0.5], abs=1e-7)
        assert float(Penalty(union, sparse, torch.device("cpu"))(B3, A3)[0]) == pytest.approx(1.125)
        assert float(Penalty(multiset, sparse, torch.device("cpu"))(B3, A3)[0]) == pytest.approx(1.0)
        nothing = Penalty(first, sparse, torch.device("cpu"))(torch.zeros(2, 1), A2)
        assert all(float(part.abs().sum()) == 0 for part in nothing)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    st.integers(0, 81),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_value_and_gradients_equal_autograds(shape, k, repeated, sparse, seed):
    m, n, r = shape
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    positions = Positions.largest(torch.rand(m, n, generator=generator), min(k, m * n))
    if repeated:
        positions = positions.joined(Positions.largest(torch.rand(m, n, generator=generator), m * n // 2), count=True)
    value, to_b, to_a = Penalty(positions, sparse, torch.device("cpu"))(b, a)
    wide_b, wide_a = (t.double().requires_grad_() for t in (b, a))
    listed = positions.flat.repeat_interleave(positions.counts.long())
    expected = (wide_b @ wide_a).flatten()[listed].abs().sum() / max(len(listed), 1)
    expected.backward()
    assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(to_b.double(), wide_b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_a.double(), wide_a.grad, rtol=1e-4, atol=1e-5)
    assert value >= 0
    doubled = Penalty(positions, sparse, torch.device("cpu"))(2 * b, -3 * a)[0]
    assert float(doubled) == pytest.approx(6 * float(value), rel=1e-4, abs=1e-6)
    mixing = torch.eye(r) + torch.triu(torch.ones(r, r), 1)
    same = Penalty(positions, sparse, torch.device("cpu"))(b @ mixing, torch.linalg.inv(mixing) @ a)[0]
    assert float(same) == pytest.approx(float(value), rel=1e-3, abs=1e-5)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 64), st.integers(0, 99))
def test_exactly_k_positions_none_smaller_than_one_left_out(m, n, k, seed):
    k = min(k, m * n)
    values = torch.randint(0, 4, (m, n), generator=torch.Generator().manual_seed(seed)).float()
    chosen = Positions.largest(values, k)
    order = sorted(range(m * n), key=lambda i: (-float(values.flatten()[i]), i))
    assert chosen.flat.tolist() == sorted(order[:k])
    assert Positions.largest(7 * values, k).flat.tolist() == chosen.flat.tolist()


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_both_storage_forms_are_exact_and_the_smaller_is_taken(m, n, share, count, seed):
    generator = torch.Generator().manual_seed(seed)
    k = int(share * m * n)
    positions = Positions.largest(torch.rand(m, n, generator=generator), k)
    if count:
        positions = positions.joined(Positions.largest(torch.rand(m, n, generator=generator), k), count=True)
    packed = positions.packed()
    again = Positions.unpacked(packed)
    assert torch.equal(again.flat, positions.flat)
    assert torch.equal(again.counts, positions.counts)
    assert again.shape == positions.shape
    bits, indices = -(-m * n // 8), 4 * len(positions.flat)
    counts = len(positions.flat) if bool((positions.counts > 1).any()) else 0
    assert positions.n_bytes <= min(bits, indices) + counts


def test_the_union_is_idempotent_monotone_and_independent_of_order():
    values = [torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    a, b, c = (Positions.largest(v, 9) for v in values)
    assert torch.equal(a.joined(a, False).flat, a.flat)
    assert set(a.flat.tolist()) <= set(a.joined(b, False).flat.tolist())
    left, right = a.joined(b, False).joined(c, False), c.joined(b, False).joined(a, False)
    assert torch.equal(left.flat, right.flat)


def plain_loop(percent=20.0, strength=3.0, accumulate=1, epochs=2):
    """The penalty in the loss, dense and by autograd; merging by hand."""
    module = lora_module()
    entries = lora_layers(module)
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    import numpy as np

    masks: dict = {}
    stream = make_stream()
    for k, experience in enumerate(stream):
        if k > 0:
            for entry in entries:
                b, a = entry.factors
                update = (b @ a).abs().flatten()
                kept = int(percent / 100 * len(update))
                mask = torch.zeros(len(update), dtype=torch.bool)
                mask[update.argsort(descending=True)[:kept]] = True
                masks[entry.name] = masks.get(entry.name, torch.zeros_like(mask)) | mask
            merge_adapters(entries, 0, 21, k - 1)
            for entry in entries:
                for p in entry.weights:
                    optimizer.state.pop(p)
        x, y = experience.train.x, experience.train.y
        for epoch in range(epochs):
            order = torch.from_numpy(np.random.default_rng((4, 0, 1, k, epoch)).permutation(len(x)))
            parts = order.split(8)
            for i, rows in enumerate(parts, start=1):
                (cross_entropy(module(x[rows]), y[rows]) / accumulate).backward()
                if i % accumulate and i < len(parts):
                    continue
                if masks:
                    terms = [(e.factors[0] @ e.factors[1]).flatten()[masks[e.name]].abs().mean() for e in entries]
                    (strength * sum(terms) / len(entries)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return module


@pytest.mark.parametrize("product", ["dense", "sparse"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_those_of_a_plain_loop(product, accumulate):
    actual = fit([RegLoRA(3.0, percent=20, product=product)], accumulate_grad_batches=accumulate)
    expected = plain_loop(accumulate=accumulate)
    merge_adapters(lora_layers(expected), 0, 21, 2)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_the_first_experience_is_bitwise_plain_lora():
    kept = []

    class Keep(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            kept.append(state(module))

    fit([Naive(), Keep()])
    fit([RegLoRA(1.0), Keep()])
    assert all(torch.equal(kept[0][name], kept[3][name]) for name in kept[0])
    assert any(not torch.equal(kept[1][name], kept[4][name]) for name in kept[0])


def test_strength_zero_only_merges():
    fresh = [fit([RegLoRA(strength)]) for strength in (0.0, 0.0, 50.0)]
    states = [state(module) for module in fresh]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_merging_keeps_the_outputs_and_starts_from_zero():
    module = lora_module()
    for entry in lora_layers(module):
        torch.nn.init.normal_(entry.weights[0], generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 6)
    before, old = module(x), [entry.weights[1].clone() for entry in lora_layers(module)]
    rng = torch.get_rng_state()
    merge_adapters(lora_layers(module), 3)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.testing.assert_close(module(x), before)
    for entry, a in zip(lora_layers(module), old, strict=True):
        assert not entry.weights[0].any()
        assert entry.weights[1].any()
        assert not torch.equal(entry.weights[1], a)


def test_only_adapters_and_saved_modules_move_during_an_experience():
    seen = []

    class Keep(pl.Callback):
        def on_experience_start(self, trainer, module, experience):
            seen.append(state(module))

        def on_experience_end(self, trainer, module, experience):
            seen.append(state(module))

    fit([RegLoRA(1.0), Keep()])
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert [name for name in moved if "lora_" not in name and "modules_to_save" not in name] == []


def test_a_stronger_penalty_leaves_smaller_updates_where_it_acts():
    kept = []

    class Keep(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            if experience.index == 2:
                values = []
                for entry in lora_layers(module):
                    positions = strategy.positions[entry.name].flat
                    values.append((entry.factors[0] @ entry.factors[1]).detach().flatten()[positions].abs().mean())
                kept.append(float(torch.stack(values).mean()))

    for strength in (0.0, 5.0, 20.0):
        strategy = RegLoRA(strength, percent=20)
        fit([strategy, Keep()], lora_module())
    assert kept[0] > kept[1] > kept[2]


def test_what_is_not_finite_is_not_remembered():
    strategy, module = RegLoRA(percent=50), lora_module()
    first, second = lora_layers(module)
    for entry in (first, second):
        torch.nn.init.ones_(entry.weights[0])
    with torch.no_grad():
        first.weights[0][0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        strategy._record(first, private_rng(0))
    strategy._record(second, private_rng(0))
    assert list(strategy.positions) == [second.name]


def remembered(select, updates, seed=0, experience=0):
    strategy, module = RegLoRA(percent=25, select=select, seed=seed), lora_module()
    strategy.layers = lora_layers(module)
    with torch.no_grad():
        for entry, update in zip(strategy.layers, updates, strict=True):
            b, a = (factor.zero_() for factor in entry.factors)
            # a product of rank 1: the update's rows are its first one, times 1, 2, ...
            b[:, 0], a[0] = torch.arange(1.0, len(b) + 1), update
    strategy.remember(experience)
    return [strategy.positions[entry.name].flat.tolist() for entry in strategy.layers]


def test_the_controls_remember_the_smallest_and_random_entries():
    updates = [torch.arange(1.0, 7), -torch.arange(1.0, 17)]
    for select, sign in (("largest", -1), ("smallest", 1)):
        for found, update in zip(remembered(select, updates), updates, strict=True):
            values = {(i, j): (i + 1) * abs(float(v)) for i in range(16) for j, v in enumerate(update)}
            order = sorted(values, key=lambda place: (sign * values[place], place))[: len(values) // 4]
            assert found == sorted(i * len(update) + j for i, j in order)
    drawn = remembered("random", updates)
    assert [len(positions) for positions in drawn] == [24, 64]
    assert all(positions == sorted(set(positions)) for positions in drawn)
    assert drawn == remembered("random", [-updates[0], 3 * updates[1]])
    assert len({str(drawn), *(str(remembered("random", updates, *seeds)) for seeds in ((1, 0), (0, 1)))}) == 3


def test_an_untrained_adapter_is_not_remembered():
    strategy = RegLoRA(percent=50)
    for entry in lora_layers(lora_module()):
        strategy._record(entry, private_rng(0))
    assert strategy.positions == {}


def test_more_than_half_of_a_layer_warns():
    with pytest.warns(UserWarning, match="more than half"):
        fit([RegLoRA(percent=60)])


def test_a_layer_of_another_shape_is_refused():
    strategy = RegLoRA()
    strategy.layers = lora_layers(lora_module())
    strategy.positions = {strategy.layers[0].name: Positions.largest(torch.rand(3, 3), 2)}
    with pytest.raises(ConfigurationError, match=r"\(16, 6\) now"):
        strategy._prepare()


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([RegLoRA(), EWC()], "use one of them"),
        ([EWC(), RegLoRA()], "use one of them"),
        ([EMABalance(), RegLoRA()], "put RegLoRA before EMABalance"),
    ],
)
def test_what_does_not_fit_together_is_refused(callbacks, words):
    with pytest.raises(ConfigurationError, match=words):
        fit(callbacks)


@pytest.mark.parametrize("others", [[EMABalance()], [ExperienceReplay(20)], [ExperienceReplay(20), EMABalance()]])
def test_it_composes(others):
    module = fit([RegLoRA(1.0), *others])
    assert all(p.isfinite().all() for p in module.parameters())


def test_without_lora_it_says_what_to_do():
    with pytest.raises(ConfigurationError, match=r"adapter=peft.LoraConfig"):
        fit([RegLoRA()], UserModule())


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -1.0},
        {"percent": 0.0},
        {"percent": 101.0},
        {"duplicates": "both"},
        {"product": "fast"},
        {"select": "all"},
    ],
)
def test_bad_values_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        RegLoRA(**settings)


@pytest.mark.parametrize("step", [5, 10, 13, 28])
def test_it_resumes_bit_identically(step, tmp_path):
    def run(checkpoint=None):
        torch.manual_seed(0)
        strategy, module = RegLoRA(5.0, percent=10, duplicates="multiset"), LoraModule(dropout=0.2)
        data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
        saves = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [strategy, *([] if checkpoint else [saves])]
        trainer = pl.Trainer(
            max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, "enable_checkpointing": checkpoint is None}
        )
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return state(module), strategy.state_dict()

    whole, kept = run()
    resumed, again = run(tmp_path / f"step={step}.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert str(kept) == str(again)


def test_the_choice_of_product_follows_size_rank_and_density():
    def sparse(m, n, share, rank):
        return prefers_sparse(Positions((m, n), torch.arange(int(share * m * n)), torch.empty(0)), rank)

    assert not sparse(192, 64, 0.02, 8)
    assert sparse(2304, 768, 0.02, 8)
    assert not sparse(2304, 768, 0.1, 8)
    assert sparse(2304, 768, 0.1, 128)


def test_seeds_of_new_adapters_are_private():
    assert private_rng(0, 21, 0).integers(2**31) != private_rng(0, 21, 1).integers(2**31)
