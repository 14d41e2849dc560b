from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import UserModule, make_stream
from test_reglora import fit, lora_module, state
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError
from clkit.method.adapters import lora_layers, merge_adapters
from clkit.strategies import EWC, EMABalance, ExperienceReplay, Naive, OLoRA, RegLoRA
from clkit.strategies.olora import overlap

FORMS = ("square", "absolute")


def paper_penalty(earlier, a, form):
    """The paper's sum over earlier adapters and over all pairs of rows."""
    power = {"square": 2, "absolute": 1}[form]
    return sum((old @ a.T)[j, k].abs() ** power for old in earlier for j in range(len(old)) for k in range(len(a)))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.sampled_from(FORMS), st.integers(0, 99))
def test_value_and_gradient_equal_autograds_of_the_papers_sum(t, r, n, form, seed):
    generator = torch.Generator().manual_seed(seed)
    earlier = [torch.randn(r, n, generator=generator) for _ in range(t)]
    a = torch.randn(r, n, generator=generator)
    value, gradient = overlap(torch.cat(earlier), a, form)
    wide = a.double().requires_grad_()
    expected = paper_penalty([old.double() for old in earlier], wide, form)
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_an_example_by_hand(form):
    rows, a = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([[1.0, -1.0, 2.0]])
    value, gradient = overlap(rows, a, form)  # products: -1 and 6
    assert float(value) == {"square": 37, "absolute": 7}[form]
    assert gradient.tolist() == {"square": [[-2.0, -4.0, 36.0]], "absolute": [[-1.0, -2.0, 3.0]]}[form]


@pytest.mark.parametrize("form", FORMS)
def test_orthogonal_subspaces_cost_nothing(form):
    value, gradient = overlap(torch.eye(5)[:3] * 4, torch.eye(5)[3:], form)
    assert float(value) == 0
    assert not gradient.any()


def test_the_square_form_comes_to_rest_and_the_absolute_one_does_not():
    generator = torch.Generator().manual_seed(0)
    rows, start = torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator)
    left = {}
    for form in FORMS:
        a = start.clone()
        for _ in range(1000):
            a -= 0.02 * overlap(rows, a, form)[1]
        left[form] = float(overlap(rows, a, "absolute")[0])
    assert left["square"] < 1e-4
    assert left["absolute"] > 1e-2


def plain_loop(strength, l2, form, accumulate=1, epochs=2):
    """The penalty in the loss, by autograd, against a list of earlier adapters."""
    module = lora_module()
    entries = lora_layers(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    earlier: dict = {entry.name: [] for entry in entries}
    for k, experience in enumerate(make_stream()):
        if k > 0:
            for entry in entries:
                earlier[entry.name].append(entry.factors[1].detach().clone())
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
                if k > 0:
                    penalty = sum(strength * paper_penalty(earlier[e.name], e.factors[1], form) for e in entries)
                    (penalty + l2 * sum(torch.norm(p) for e in entries for p in e.weights)).backward()
                optimizer.step()
                optimizer.zero_grad()
    merge_adapters(entries, 0, 21, 2)
    return module


@pytest.mark.parametrize(("form", "l2", "accumulate"), [("square", 0.0, 1), ("square", 0.05, 2), ("absolute", 0.05, 1)])
def test_weights_equal_those_of_a_plain_loop(form, l2, accumulate):
    actual = fit([OLoRA(0.05, l2=l2, form=form)], accumulate_grad_batches=accumulate).state_dict()
    for name, tensor in plain_loop(0.05, l2, form, accumulate).state_dict().items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


class Keep(pl.Callback):
    def __init__(self):
        self.states, self.updates, self.outputs = [], [], []

    def on_experience_end(self, trainer, module, experience):
        self.states.append(state(module))
        entries = lora_layers(module)
        self.updates.append(
            {e.name: (e.factors[0] @ e.factors[1] * e.layer.scaling[e.adapter]).detach() for e in entries}
        )
        self.outputs.append(module(torch.ones(2, 6)).detach())

    def on_experience_start(self, trainer, module, experience):
        self.outputs.append(module(torch.ones(2, 6)).detach())


def test_the_first_experience_is_bitwise_plain_lora():
    plain, ours = Keep(), Keep()
    fit([Naive(), plain])
    fit([OLoRA(1.0, l2=1.0), ours])
    assert all(torch.equal(plain.states[0][name], ours.states[0][name]) for name in plain.states[0])
    assert any(not torch.equal(plain.states[1][name], ours.states[1][name]) for name in plain.states[0])


def test_the_merged_weights_are_the_sum_of_all_adapters():
    start, kept = lora_module(), Keep()
    module = fit([OLoRA(0.1), kept])
    for before, after in zip(lora_layers(start), lora_layers(module), strict=True):
        expected = before.layer.get_base_layer().weight + sum(updates[before.name] for updates in kept.updates)
        torch.testing.assert_close(after.layer.get_base_layer().weight, expected)
        assert not after.weights[0].any()
    _, *between, last = kept.outputs
    for end, next_start in zip(between[::2], between[1::2], strict=True):
        torch.testing.assert_close(next_start, end)
    torch.testing.assert_close(module(torch.ones(2, 6)), last)


def test_all_earlier_adapters_are_kept_as_they_ended():
    strategy, kept = OLoRA(0.1), Keep()
    fit([strategy, kept])
    for name, rows in strategy.subspaces.items():
        expected = [states[f"{name}.lora_A.default.weight"] for states in kept.states]
        assert torch.equal(rows, torch.cat(expected))
        assert rows.dtype == torch.float32


def test_strength_zero_only_merges():
    ours, others = state(fit([OLoRA(0.0)])), state(fit([RegLoRA(0.0)]))
    assert all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize(("form", "strengths"), [("square", (0.0, 0.02, 0.2)), ("absolute", (0.0, 0.005, 0.02))])
def test_a_stronger_penalty_leaves_less_overlap(form, strengths):
    left = []
    for strength in strengths:
        strategy = OLoRA(strength, form=form)
        fit([strategy])
        left.append(sum(float(overlap(rows[:3], rows[3:6], "square")[0]) for rows in strategy.subspaces.values()))
    assert left[0] > left[1] > left[2]


def test_l2_leaves_smaller_adapters():
    sizes = []
    for l2 in (0.0, 0.1):
        kept = Keep()
        fit([OLoRA(0.0, l2=l2), kept])
        sizes.append(sum(float(update.norm()) for update in kept.updates[1].values()))
    assert sizes[0] > 1.2 * sizes[1]


def test_the_overlap_is_logged():
    seen = []

    class Read(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(trainer.logged_metrics.get("olora/overlap"))

    fit([OLoRA(0.1), Read()], log_every_n_steps=1)
    assert seen[:10] == [None] * 10
    assert all(value > 0 for value in seen[10:])


def test_no_direction_left_warns():
    with pytest.warns(UserWarning, match="used 6 of the 6 directions"):
        fit([OLoRA(0.1)])


def test_a_layer_with_other_inputs_is_refused():
    strategy = OLoRA()
    strategy.load_state_dict({"last": None, "subspaces": {lora_layers(lora_module())[0].name: torch.ones(3, 5)}})
    with pytest.raises(ConfigurationError, match=r"remembers 5 inputs of .*, which has 6 now"):
        fit([strategy])


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [([OLoRA(), EWC()], "use one of them"), ([EMABalance(), OLoRA()], "put OLoRA before EMABalance")],
)
def test_what_does_not_fit_together_is_refused(callbacks, words):
    with pytest.raises(ConfigurationError, match=words):
        fit(callbacks)


def test_it_composes():
    module = fit([OLoRA(0.1), ExperienceReplay(20), EMABalance()])
    assert all(p.isfinite().all() for p in module.parameters())


def test_without_lora_it_says_what_to_do():
    with pytest.raises(ConfigurationError, match=r"adapter=peft.LoraConfig"):
        fit([OLoRA()], UserModule())


@pytest.mark.parametrize("values", [{"strength": -1.0}, {"l2": -0.1}, {"form": "cube"}])
def test_bad_values_are_refused(values):
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        OLoRA(**values)
