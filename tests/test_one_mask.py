"""The attention of all layers has one mask of numbers, and gives what it gives with one for each."""

from __future__ import annotations

import copy

import pytest
import torch
from test_labelled import CONFIGS, batch, loss_and_gradients
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clkit.language.one_mask import one_mask


def built(name: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def padded(side: str) -> dict[str, torch.Tensor]:
    inputs = batch()
    inputs["attention_mask"][0, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    return inputs


def saved_masks(model, inputs) -> list[int]:
    """Where the masks lie that are kept for the backward pass, one entry for each layer."""
    found = []

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[2] == tensor.shape[3] == 9:
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    places = [tensor.data_ptr() for tensor in found]
    loss.backward()
    return places


def test_what_is_kept_for_the_backward_pass_has_one_mask():
    model, inputs = built("llama"), padded("right")
    apart = saved_masks(model, inputs)
    assert len(set(apart)) == len(apart) == 2
    with one_mask():
        shared = saved_masks(model, inputs)
    assert len(set(shared)) == 1
    assert len(shared) == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("qwen3", "sdpa"), ("gpt2", "sdpa"), ("opt", "eager")]
)
def test_loss_and_gradients_are_the_same_bits(name, attention, autocast, side):
    model, inputs = built(name, attention), padded(side)
    take = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, gradients = take(model(**inputs).loss)
        with one_mask():
            loss, found = take(model(**inputs).loss)
    assert torch.equal(loss, expected)
    assert all(torch.equal(mine, other) for mine, other in zip(found, gradients, strict=True))


def test_recomputed_activations_are_the_same_too():
    model, inputs = built("llama"), padded("right")
    take = loss_and_gradients(model)
    expected, gradients = take(model(**inputs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with one_mask():
        loss = model(**inputs).loss
    # the layers are computed again where the context has ended
    loss, found = take(loss)
    assert torch.equal(loss, expected)
    assert all(torch.equal(mine, other) for mine, other in zip(found, gradients, strict=True))


def test_a_function_of_the_users_own_is_called_and_stays():
    before, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counting(*args, **options):
        calls.append(args[4].dtype)
        return before(*args, **options)

    model, inputs = built("llama"), padded("right")
    with one_mask():
        pass
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    ALL_ATTENTION_FUNCTIONS["sdpa"] = counting
    try:
        with one_mask():
            model(**inputs)
        assert calls == [torch.float32] * 2
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counting
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
