"""Encoder-decoders: samples, loss, scores, generation, memories, resuming, LoRA and the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from language import make_module as make_decoder
from language import write_tasks
from plain import QUIET
from seq2seq import ADAPTER, END, PAD, make_config, make_module, make_stream, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, T5ForConditionalGeneration

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit import strategies as s
from clkit.evaluation.token_scores import answer_loss, token_accuracy
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores, answers_to, generate
from clkit.language.labelled import labelled_only
from clkit.language.models import Seq2SeqLM, describes_encoder_decoder
from clkit.language.records import Record
from clkit.method.adapters import lora
from clkit.scenarios import Instructions
from clkit.testing import small_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("seq2seq") / "tasks")


def fit(stream, callbacks, module, steps=5, ckpt_path=None, **data):
    data = StreamDataModule(stream, **{"batch_size": 4, "steps": steps, **data})
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


def stronger(module, by=3.0):
    """Weights of which answers depend on prompts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(by)
    return module.eval()


def test_prompts_and_answers_are_apart_as_the_tokenizer_marks_them():
    tokenizer = make_tokenizer()
    data = InstructionDataset(
        [Record((("user", "red blue"),), "yes"), Record((("user", "one"),), "two three")],
        tokenizer,
        encoder_decoder=True,
        prompt_template="name : {prompt}",
    )
    number = tokenizer.convert_tokens_to_ids
    first = data[0]
    assert first["input_ids"].tolist() == [*number(["name", ":", "red", "blue"]), END]
    assert first["labels"].tolist() == [*number(["yes"]), END]
    assert data.for_scores()[1]["labels"].tolist() == [*number(["two", "three"]), -100]
    assert data.prompt(1).tolist() == [*number(["name", ":", "one"]), END]
    assert data.lengths.tolist() == [7, 7]
    assert (data.longest, data.ends) == (5, [END])
    batch = Pad()([data[0], data[1]])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[*number(["yes"]), END, -100], [*number(["two", "three"]), END]]


def test_a_mark_before_a_target_is_learned_and_scored_with_it():
    tokenizer = small_tokenizer(chat=False)
    marks = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=marks)
    data = InstructionDataset([Record((("user", "red"),), "blue")], tokenizer, encoder_decoder=True)
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    assert data[0]["input_ids"].tolist() == [1, red, 2]
    assert data[0]["labels"].tolist() == [1, blue, 2]
    assert data.for_scores()[0]["labels"].tolist() == [1, blue, -100]


def test_long_prompts_lose_their_middle_and_answers_nothing():
    record = Record((("user", "what is " + "red " * 30 + "?"),), "blue green")
    with pytest.warns(UserWarning, match="1 samples have more than 20 tokens"):
        data = InstructionDataset(
            [record], make_tokenizer(), encoder_decoder=True, max_length=20, too_long="cut_prompt", name="x"
        )
    number = make_tokenizer().convert_tokens_to_ids
    assert data[0]["labels"].tolist() == [*number(["blue", "green"]), END]
    ids = data[0]["input_ids"].tolist()
    assert 12 < len(ids) <= 17
    assert (ids[0], ids[-2:]) == (number("what"), [number("?"), END])


@pytest.mark.parametrize("adapted", [False, True])
def test_training_is_a_plain_loop_of_transformers(root, adapted):
    stream = make_stream(root)
    module, plain = (make_module(adapted=adapted) for _ in range(2))
    data = StreamDataModule(stream, batch_size=4, steps=4, group_by_length=True)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]))

    fit(stream, [Watch()], module, steps=4, group_by_length=True)
    optimizer = torch.optim.SGD([p for p in plain.net.parameters() if p.requires_grad], lr=0.05)
    expected = []
    for k in range(3):
        data.trainer = SimpleNamespace(
            **{"current_epoch": k, "accumulate_grad_batches": 1, "limit_train_batches": 1.0, "overfit_batches": 0},
            **{"world_size": 1, "global_rank": 0, "callbacks": []},
        )
        order = data.train_dataloader()
        for number in range(len(order)):
            records = [stream[k].train.records[i] for i in order.indices(number).tolist()]
            tokenizer = make_tokenizer()
            inputs = tokenizer([r.prompt for r in records], padding=True, return_tensors="pt")
            labels = tokenizer(text_target=[r.answer for r in records], padding=True, return_tensors="pt")
            masked = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
            loss = plain.net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=masked).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(float(loss))
    assert seen == pytest.approx(expected, rel=1e-5)
    for name, parameter in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], parameter, rtol=1e-4, atol=1e-6)
    if adapted:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        assert all("lora" in name for name in trained)
        assert any("encoder" in name for name in trained)
        assert any("decoder" in name for name in trained)


def test_labelled_only_steps_aside(root):
    module = make_module()
    batch = Pad()([make_stream(root)[0].train[i] for i in range(5)])
    with labelled_only(module.net):
        output = module.net(**batch)
    assert torch.equal(output.loss, module.net(**batch).loss)
    assert output.logits is not None


def test_scores_are_those_of_one_answer_alone_token_by_token(root):
    data = make_stream(root)[1].test
    module = stronger(make_module())
    batch = Pad()([data[i] for i in range(7)])
    found = torch.stack([token_accuracy(module, batch), answer_loss(module, batch)], dim=1)
    tokenizer = make_tokenizer()
    for row in range(7):
        record = data.records[row]
        answer = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
        hits, losses, given = [], [], [PAD]
        for token in answer:
            with torch.no_grad():
                logits = module.net(
                    input_ids=torch.tensor([tokenizer(record.prompt)["input_ids"]]),
                    decoder_input_ids=torch.tensor([given]),
                ).logits[0, -1]
            hits.append(float(logits.argmax() == token))
            losses.append(-float(logits.log_softmax(-1)[token]))
            given.append(token)
        assert found[row].tolist() == pytest.approx([np.mean(hits), np.mean(losses)], rel=1e-4)


def test_the_curves_of_a_run_are_scores_of_each_step(root, tmp_path):
    stream, weights = make_stream(root, ("colours", "options")), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            module.eval()
            batches = [Pad()([e.test[i] for i in range(9)]) for e in stream]
            with torch.no_grad():
                weights.append([float(token_accuracy(module, batch).mean()) for batch in batches])
            module.train()

    def curve(name, **options):
        gap = StabilityGap(1, None, score="token_accuracy", dir=tmp_path / name, plot=False, batch_size=4, **options)
        fit(stream, [gap, Watch()], make_module(adapted=True, lr=1.0), steps=3)
        return gap.history.select("step").scores

    found = curve("cached")
    for step, expected in enumerate(weights[:6]):
        seen = 1 if step < 3 else 2
        assert found[step, :seen].tolist() == pytest.approx(expected[:seen])
    np.testing.assert_array_equal(curve("plain", prefix_cache=False), found)


@pytest.mark.parametrize("adapted", [False, True])
def test_generation_in_batches_is_greedy_decoding_one_by_one(root, adapted):
    module, data = stronger(make_module(adapted=adapted), 2.5), make_stream(root)[0].test
    tokenizer = make_tokenizer()
    prompts = [data.prompt(i) for i in range(7)]
    together = answers_to(module, prompts, tokenizer, max_new_tokens=4, batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        given = [PAD]
        with torch.no_grad():
            while len(given) <= 4 and given[-1] != END:
                logits = module.net(input_ids=prompt[None], decoder_input_ids=torch.tensor([given])).logits
                given.append(int(logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(given[1:], skip_special_tokens=True).strip()
        assert answer.is_cut is (END not in given)
    assert len({answer.text for answer in together}) > 1


def test_a_first_token_that_the_model_forces_is_forced(root):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 24}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=len(make_tokenizer()), **sizes, **heads, **marks)
    module = Seq2SeqLM(config).eval()
    module.net.generation_config.forced_bos_token_id = 7
    data = make_stream(root)[0].test
    texts = generate(module, [data.prompt(0)], make_tokenizer(), max_new_tokens=1)
    assert texts == [make_tokenizer().decode([7])]
    # positions are those of the longer of the two texts
    stream = make_stream(root, ("colours",))
    assert max(stream[0].train.lengths) < 24
    with pytest.raises(ConfigurationError, match="max_new_tokens=24 that is more than the 24 positions"):
        fit(stream, [AnswerScores(2, max_new_tokens=24)], Seq2SeqLM(config), steps=1)
    config.max_position_embeddings = longest = stream[0].train.longest
    fit(stream, [], Seq2SeqLM(config), steps=1)
    config.max_position_embeddings = longest - 1
    with pytest.raises(ConfigurationError, match=f"The longest text has {longest} tokens"):
        fit(stream, [], Seq2SeqLM(config), steps=1)


METHODS = {
    "er on disk": lambda: s.ExperienceReplay(20, device="disk"),
    "ewc": lambda: s.EWC(10.0),
    "ilora": lambda: s.InterpolatedLoRA(20, gamma=0.0),
    "per_task": lambda: s.PerTask(),
    "disco": lambda: s.DISCO(),
    "ema_balance": lambda: s.EMABalance(),
}


@pytest.mark.parametrize("name", METHODS)
def test_strategies_train_encoder_decoders_and_resume_to_the_same_bits(root, tmp_path, name):
    def callbacks():
        scores = AnswerScores(4, max_new_tokens=3, before=True, dir=tmp_path)
        gap = StabilityGap(2, 4, score="token_accuracy", dir=tmp_path, plot=False, batch_size=4)
        return [METHODS[name](), scores, gap]

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    stream = make_stream(root, ("colours", "options"))
    whole = fit(stream, [*callbacks(), Save()], make_module(adapted=True), steps=4)
    files = {file: (tmp_path / file).read_bytes() for file in ("answers.json", "answers.csv", "history.csv")}
    resumed = fit(stream, callbacks(), make_module(seed=1, adapted=True), steps=4, ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {file: (tmp_path / file).read_bytes() for file in files} == files
    assert all(p.isfinite().all() for p in whole.parameters())


@pytest.mark.parametrize("device", [None, "disk"])
def test_a_memory_gives_prompts_and_answers_back_whole(tmp_path, device):
    # of all lengths, so that in some batches both are as wide
    words = ["red", "green", "blue", "one", "two"]
    texts = [(" ".join(words[:n]), " ".join(words[-m:])) for n in range(1, 6) for m in range(1, 6)]
    for split in ("train", "test"):
        path = tmp_path / "sums" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([{"prompt": prompt, "answer": answer} for prompt, answer in texts]))
    stream, strategy = make_stream(tmp_path, ("sums",), metrics={}), s.ExperienceReplay(99, device=device)
    fit(stream, [strategy], make_module(), steps=None, epochs=1, batch_size=2)
    found = strategy.remembered()
    pairs = {
        (tuple(ids[mask.bool()].tolist()), tuple(labels[labels != -100].tolist()))
        for ids, mask, labels in zip(found["input_ids"], found["attention_mask"], found["labels"], strict=True)
    }
    data = stream[0].train
    expected = {(tuple(data[i]["input_ids"].tolist()), tuple(data[i]["labels"].tolist())) for i in range(len(data))}
    assert pairs == expected


def test_it_learns(root, tmp_path):
    stream = make_stream(root, ("colours",))
    scores = AnswerScores(None, max_new_tokens=3, before=True, dir=tmp_path)
    torch.manual_seed(0)
    module = Seq2SeqLM(make_config(), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    fit(stream, [scores], module, steps=60)
    assert float(scores.zero_shot()) == 0
    assert float(scores.matrix()) > 0.8


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda root: Seq2SeqLM(make_decoder(adapter=None).net.config),
            "AutoModelForSeq2SeqLM has no model for a LlamaConfig",
        ),
        (lambda root: Seq2SeqLM(make_decoder(adapter=None).net), "is no encoder-decoder; use CausalLM"),
        (
            lambda root: Seq2SeqLM(make_config(), adapter=lora(2, **{**ADAPTER, "task_type": "CAUSAL_LM"})),
            "task_type='CAUSAL_LM'.*adapter=lora_seq2seq",
        ),
        (lambda root: fit(make_stream(root), [], make_decoder()), "goes on with a prompt.*encoder_decoder=False"),
        (
            lambda root: fit(make_stream(root, encoder_decoder=False), [], make_module()),
            "is an encoder-decoder.*scenario.encoder_decoder=true",
        ),
        (lambda root: make_stream(root, side="left"), "padded on the right"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(root, make, said):
    with pytest.raises(ConfigurationError, match=said):
        make(root)


def test_the_configuration_of_a_model_says_what_it_is(root, tmp_path):
    T5ForConditionalGeneration(make_config()).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    make_decoder(adapter=None).net.save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "bare")
    names = {name: describes_encoder_decoder(str(tmp_path / name)) for name in ("t5", "llama", "bare", "x.gguf")}
    assert names == {"t5": True, "llama": False, "bare": False, "x.gguf": False}
    streams = [
        Instructions(["sums"], tokenizer=tokenizer, root=root)
        for tokenizer in (str(tmp_path / "t5"), str(tmp_path / "bare"), make_tokenizer())
    ]
    assert [stream[0].train.encoder_decoder for stream in streams] == [True, False, False]


@pytest.mark.slow
def test_the_command_line_trains_exports_and_reports_one(root, tmp_path, capsys):
    from command_line import composed

    from clkit.run.export import export
    from clkit.run.train import run

    T5ForConditionalGeneration(make_config()).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    chosen = ["scenario=instructions", "model=seq2seq_lm", f"model.net={tmp_path / 'model'}", "adapter=lora_seq2seq"]
    cheap = ["trainer=cpu", "data.steps=2", "logger=none", "trainer.enable_progress_bar=false", "evaluation.every=2"]
    asked = ["callbacks=answers", "callbacks.answers.subset=3", "callbacks.answers.before=true"]
    general = ["scenario.tasks=[colours,sums]", "scenario.general=[options]", f"scenario.root={root}"]
    run(composed(*chosen, *cheap, *asked, *general, "callbacks.answers.max_new_tokens=2"), tmp_path / "run")
    text = " ".join(capsys.readouterr().out.split())
    for words in ("generated answers to each task", "(before training)", "general tasks in percent", "options"):
        assert words in text
    assert (tmp_path / "run" / "report.md").read_text().count("(before training)") == 2
    found = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [len(found["score"]["before"]), len(found["general"]["score"]["matrix"])] == [2, 2]
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base)" in card
