"""Language models in the same loop as images: training, scores, strategies, resuming."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from language import make_config, make_module, write_tasks
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit import strategies as s
from clkit.evaluation.token_scores import answer_loss, answer_probability, language_model, token_accuracy
from clkit.language.dataset import Pad
from clkit.language.generation import AnswerScores, generate
from clkit.language.models import CausalLM, TextClassifier, load_tokenizer
from clkit.scenarios import Instructions
from clkit.testing import small_language_module, small_tokenizer

QUIET = {
    **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
    **{"enable_checkpointing": False},
}


@pytest.fixture
def stream(tmp_path):
    metrics = {"sums": "number", "colours": "exact_match", "options": "letter"}
    order = ["colours", "sums", "options"]
    return Instructions(order, tokenizer=small_tokenizer(), root=write_tasks(tmp_path / "tasks"), metrics=metrics)


def fit(stream, callbacks, module=None, steps=6, batch_size=4, ckpt_path=None, **options):
    module = make_module() if module is None else module
    data = StreamDataModule(stream, batch_size=batch_size, steps=steps)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


def batch_of(stream, n=5, side="right"):
    return Pad(side)([stream[0].test[i] for i in range(n)])


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_one_text_alone_token_by_token(stream, side):
    module = make_module().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(3 if "lora" not in name else 1)
        batch = batch_of(stream, side=side)
        hits, losses = token_accuracy(module, batch), answer_loss(module, batch)
        for row in range(5):
            sample = stream[0].test[row]
            logits = module.net(input_ids=sample["input_ids"][None]).logits[0, :-1].log_softmax(-1)
            answer = sample["labels"][1:] != -100
            targets = sample["input_ids"][1:][answer]
            expected = [float(logits[answer][i, t]) for i, t in enumerate(targets)]
            assert float(losses[row]) == pytest.approx(-sum(expected) / len(expected), rel=1e-4)
            assert float(answer_probability(module, batch)[row]) == pytest.approx(float(losses[row].neg().exp()))
            assert float(hits[row]) == float((logits[answer].argmax(-1) == targets).float().mean())


def test_a_sample_without_an_answer_has_no_score(stream):
    batch = batch_of(stream, 2)
    batch["labels"][1] = -100
    assert token_accuracy(make_module(), batch).isnan().tolist() == [False, True]
    with pytest.raises(ConfigurationError, match="needs batches with input_ids"):
        token_accuracy(make_module(), (torch.zeros(2, 3), torch.zeros(2)))


def test_padding_on_the_left_changes_neither_the_loss_nor_the_logits_of_real_tokens(stream):
    module = make_module().eval()
    right, left = batch_of(stream), batch_of(stream, side="left")
    wide = Pad("left")(
        [stream[0].test[i] for i in range(5)] + [{k: torch.cat([v] * 3) for k, v in stream[0].test[0].items()}]
    )
    wide = {key: part[:5] for key, part in wide.items()}
    with torch.no_grad():
        outputs = [module(**batch) for batch in (right, left, wide)]
    for batch, output in zip((left, wide), outputs[1:], strict=True):
        torch.testing.assert_close(output.loss, outputs[0].loss)
        real = output.logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(real, outputs[0].logits[right["attention_mask"].bool()], rtol=1e-4, atol=1e-5)


def test_training_is_a_plain_loop_over_the_same_batches(stream):
    plain = make_module()
    data = StreamDataModule(stream, batch_size=4, steps=6)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    trainer = fit(stream, [])
    for k in range(3):
        data.trainer = SimpleNamespace(
            current_epoch=k,
            accumulate_grad_batches=1,
            limit_train_batches=1.0,
            overfit_batches=0,
            world_size=1,
            global_rank=0,
            callbacks=[],
        )
        for batch in data.train_dataloader():
            logits = plain.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            flat.backward()
            optimizer.step()
    for name, parameter in plain.state_dict().items():
        torch.testing.assert_close(trainer.state_dict()[name], parameter)


def test_per_iteration_curves_answers_and_summary_of_a_run(stream, tmp_path):
    gap = StabilityGap(every=2, subset=6, score="token_accuracy", dir=tmp_path, plot=False, batch_size=4)
    answers = AnswerScores(subset=7, max_new_tokens=4, batch_size=3, dir=tmp_path)
    fit(stream, [gap, answers])
    history = gap.history
    assert history.select("step").steps.tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    found = json.loads((tmp_path / "answers.json").read_text())
    assert (found["experiences"], found["metrics"]) == (
        ["colours", "sums", "options"],
        ["exact_match", "number", "letter"],
    )
    matrix = found["score"]["matrix"]
    assert [[value is None for value in row] for row in matrix] == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    last = [json.loads(line) for line in (tmp_path / "answers" / "after_2.jsonl").read_text().splitlines()]
    assert len(last) == 21
    for k in range(3):
        scores = [answer["score"] for answer in last if answer["experience"] == k]
        assert matrix[2][k] == pytest.approx(sum(scores) / 7)
    rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert rows[0] == "after,experience,task,metric,score,strict,cut,n"
    assert len(rows) == 1 + 6
    references = {record.answer for record in stream[0].test.records}
    assert {answer["reference"] for answer in last if answer["experience"] == 0} <= references


def test_generation_in_batches_is_greedy_decoding_one_by_one(stream):
    module = make_module().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    tokenizer, dataset = small_tokenizer(), stream[0].test
    prompts = [dataset.prompt(i) for i in range(7)]
    # what published models add to every generation
    own = module.net.get_base_model().generation_config
    own.repetition_penalty, own.num_beams, own.forced_eos_token_id = 1.8, 3, tokenizer.eos_token_id
    together = generate(module, prompts, tokenizer, max_new_tokens=5, batch_size=3)
    assert module.net.get_base_model().generation_config is own
    for prompt, text in zip(prompts, together, strict=True):
        ids = prompt[None]
        with torch.no_grad():
            for _ in range(5):
                chosen = module.net(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
                if int(chosen) == tokenizer.eos_token_id:
                    break
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


def test_evaluation_on_or_off_trains_to_the_same_bits(stream, tmp_path):
    strategy = lambda: [s.ExperienceReplay(20), s.EMABalance()]  # noqa: E731
    score = StabilityGap(every=1, subset=4, score="token_accuracy", dir=tmp_path, plot=False)
    torch.manual_seed(5)
    one = fit(stream, strategy(), make_module())
    torch.manual_seed(5)
    other = fit(stream, [*strategy(), score, AnswerScores(3, max_new_tokens=2, dir=tmp_path)], make_module())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_fisher_information_of_texts_is_the_mean_square_of_each_ones_gradient(stream):
    module = make_module()
    ewc = s.EWC(1.0)
    fit(stream[:1], [ewc], module, steps=3)
    module.eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = torch.zeros_like(ewc.penalty.importance)
    for sample in (stream[0].train[i] for i in range(24)):
        logits = module.net(input_ids=sample["input_ids"][None]).logits[0, :-1]
        loss = F.cross_entropy(logits, sample["labels"][1:], ignore_index=-100)
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).square()
    torch.testing.assert_close(ewc.penalty.importance, total / 24, rtol=1e-3, atol=1e-9)


METHODS = {
    "naive": lambda: s.Naive(),
    "joint": lambda: s.Joint(),
    "er": lambda: s.ExperienceReplay(20),
    "er, two means": lambda: s.ExperienceReplay(20, alpha=0.5),
    "er on disk": lambda: s.ExperienceReplay(20, device="disk"),
    "ewc": lambda: s.EWC(10.0),
    "l2": lambda: s.L2Anchor(0.01),
    "agem": lambda: s.AGEM(6, batch_size=4),
    "gem": lambda: s.GEM(4),
    "si": lambda: s.SynapticIntelligence(),
    "ilora": lambda: s.InterpolatedLoRA(20),
    "reglora": lambda: s.RegLoRA(1.0),
    "ema_balance": lambda: s.EMABalance(),
}


@pytest.mark.parametrize("name", METHODS)
def test_strategies_train_language_models_and_resume_to_the_same_bits(stream, tmp_path, name):
    def callbacks():
        return [METHODS[name](), AnswerScores(4, max_new_tokens=3, dir=tmp_path)]

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = fit(stream, [*callbacks(), Save()], steps=5)
    answers = (tmp_path / "answers.json").read_text()
    resumed = fit(stream, callbacks(), make_module(seed=1), steps=5, ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert (tmp_path / "answers.json").read_text() == answers
    assert all(p.isfinite().all() for p in whole.parameters())
    start = make_module()
    moved = [n for n, p in whole.named_parameters() if p.requires_grad and not torch.equal(p, start.get_parameter(n))]
    assert len(moved) > 10


class Own(pl.LightningModule):
    """A user's own module around a peft model, without a forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(make_config())
        self.model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.01)


def test_a_module_of_ones_own_works_with_all_callbacks(stream, tmp_path):
    gap = StabilityGap(every=3, subset=4, score="token_accuracy", dir=tmp_path, plot=False)
    scores = AnswerScores(3, max_new_tokens=2, dir=tmp_path)
    module = fit(stream, [s.ExperienceReplay(10), s.EMABalance(), gap, scores], Own())
    assert language_model(module) is module.model
    assert len(scores.rows) == 6
    assert gap.history.select("end").steps.tolist() == [6, 12, 18]


def test_gradient_checkpointing_and_accumulation_give_the_same_weights(stream):
    def run(**options):
        module = make_module(gradient_checkpointing=options.pop("gradient_checkpointing", False))
        return fit(stream, [s.InterpolatedLoRA(20, gamma=0.5)], module, **options)

    plain = run()
    for name, parameter in run(gradient_checkpointing=True).named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_bf16_mixed_precision_trains_as_float32_does(stream, tmp_path):
    curves = {}
    for precision in ("bf16-mixed", "32-true"):
        gap = StabilityGap(every=3, subset=4, score="answer_probability", dir=tmp_path / precision, plot=False)
        module = fit(stream, [s.InterpolatedLoRA(20), gap], make_module(lr=0.1), steps=20, precision=precision)
        assert all(p.isfinite().all() for p in module.parameters())
        curves[precision] = gap.history.select("step").scores[:, 0]
    np.testing.assert_allclose(curves["bf16-mixed"], curves["32-true"], rtol=0.02)
    assert np.ptp(curves["32-true"]) > 0.1 * curves["32-true"].max()


def test_texts_are_classified_by_an_encoder(tmp_path):
    from transformers import BertConfig

    from clkit import Stream

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    rng = torch.Generator().manual_seed(0)

    def texts(classes, n):
        labels = torch.tensor(classes).repeat(n)
        lengths = torch.randint(3, 9, (len(labels),), generator=rng)
        return [
            {"input_ids": torch.full((int(m),), 1 + int(k)), "labels": k} for m, k in zip(lengths, labels, strict=True)
        ]

    parts = [(0, 1), (2, 3)]
    stream = Stream.from_datasets(
        [texts(p, 20) for p in parts], [texts(p, 6) for p in parts], n_classes=4, classes=parts, collate_fn=Pad()
    )
    torch.manual_seed(0)
    module = TextClassifier(config, **stream.model_arguments, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
    gap = StabilityGap(every=10, dir=tmp_path, plot=False)
    fit(stream, [s.ExperienceReplay(40, buffer="class_balanced"), gap], module, steps=100)
    assert gap.history.select("end").scores[-1].tolist() == [1.0, 1.0]


def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError, match="cannot load '.*nothing'"):
        CausalLM(str(tmp_path / "nothing"))
    with pytest.raises(ConfigurationError, match="cannot load '.*model.gguf'"):
        load_tokenizer(str(tmp_path / "model.gguf"))
    with pytest.raises(ConfigurationError, match="dtype='int8'"):
        CausalLM(make_config(), dtype="int8")
    with pytest.raises(ConfigurationError, match="takes texts, but the stream has samples of shape"):
        CausalLM(make_config(), input_shape=(1, 8, 8), n_classes=10)
    module = make_module(adapter=None)
    module.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        module.configure_optimizers()


def test_a_saved_model_and_tokenizer_are_loaded_by_path(tmp_path, stream):
    module = make_module(adapter=None).eval()
    module.net.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    again = CausalLM(str(tmp_path / "model")).eval()
    batch = batch_of(stream)
    assert torch.equal(again(**batch).loss, module(**batch).loss)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer("red blue")["input_ids"] == small_tokenizer()("red blue")["input_ids"]


def test_answers_need_prompts(tmp_path):
    from clkit import Classifier
    from clkit.models.networks import MLP
    from clkit.scenarios import SplitDigits

    data = StreamDataModule(SplitDigits())
    trainer = pl.Trainer(max_epochs=5, callbacks=[AnswerScores(dir=tmp_path)], **QUIET)
    with pytest.raises(ConfigurationError, match="AnswerScores needs prompts and answers"):
        trainer.fit(Classifier(MLP((1, 8, 8), 10)), datamodule=data)


def test_frozen_first_layers_of_a_language_model_are_computed_once(stream, tmp_path):
    def history(cached):
        module = make_module(adapter=None)
        module.requires_grad_(False)
        module.net.model.layers[1].mlp.requires_grad_(True)
        gap = StabilityGap(
            1, 6, score="token_accuracy", dir=tmp_path / str(cached), plot=False, batch_size=4, prefix_cache=cached
        )
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, *args):
                seen.append(len(gap._evaluator.prefix.modules) if cached else 0)

        fit(stream, [gap, Watch()], module, steps=3)
        return (tmp_path / str(cached) / "history.csv").read_text(), max(seen)

    (plain, _), (cached, n_modules) = history(False), history(True)
    assert cached == plain
    assert n_modules > 0


def test_a_model_loaded_by_name_trains_with_its_dropout(tmp_path):
    small_language_module(adapter=None).net.save_pretrained(tmp_path)
    assert all(part.training for part in CausalLM(str(tmp_path)).modules())
