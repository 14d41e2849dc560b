"""What a run has learned, loaded by other programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import SMALL, composed
from language import write_tasks

import clkit
from clkit import ConfigurationError
from clkit.run.cli import main
from clkit.run.export import _in_old_words, _with_old_names, export
from clkit.run.train import run
from clkit.testing import small_language_module, small_tokenizer

IMAGES = [*SMALL, "trainer.enable_progress_bar=false", "evaluation.every=20"]
FRESH = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_model
out, x = Path(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
assert "clkit" not in sys.modules
if (out / "model.json").exists():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    load_model(net, str(out / "model.safetensors"))
    logits = net(x)
else:
    if (out / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM as Auto
    else:
        from transformers import AutoModelForCausalLM as Auto
    from transformers import AutoTokenizer
    assert len(AutoTokenizer.from_pretrained(out)("name the colour")["input_ids"]) == 3
    logits = Auto.from_pretrained(out).eval()(input_ids=x).logits
torch.save(logits.detach(), sys.argv[3])
"""


def loaded_elsewhere(out: Path, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """The logits that another process gets, which does not know clkit."""
    torch.save(x, folder / "x.pt")
    command = [sys.executable, "-c", FRESH, str(out), str(folder / "x.pt"), str(folder / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt", weights_only=True)


def test_a_network_predicts_elsewhere_as_the_method_does(tmp_path, capsys):
    run(composed(*IMAGES, "strategy=cls_er"), tmp_path / "run", in_sweep=True)
    module, stream = clkit.load(tmp_path / "run")
    x, _ = stream[0].test.batch(torch.arange(50))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(loaded_elsewhere(tmp_path / "out", x, tmp_path), module(x))
        live = clkit.load(tmp_path / "run", view="live").module
        assert not torch.equal(live(x), module(x))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the stable weights after experience 1 (5-9)" in card
    assert f"| 0-4 | {len(stream[0].train)} | {len(stream[0].test)} | 0, 1, 2, 3, 4 |" in card
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy_matrix"][-1]
    for name, value in zip(("0-4", "5-9"), final, strict=True):
        assert f"| {name} | {value:.3f} |" in card
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="No strategy offers the view 'best'"):
        export(tmp_path / "run", tmp_path / "other", view="best")
    assert not list(tmp_path.glob("other*"))


def test_groups_of_weights_are_folders_with_a_router(tmp_path):
    run(composed(*IMAGES, "strategy=per_task"), tmp_path / "run", in_sweep=True)
    export(tmp_path / "run", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "router.json").read_text())
    stream = clkit.load(tmp_path / "run").stream
    sizes = [len(experience.test) for experience in stream]
    assert about["experiences"] == {"0-4": {"task_0": sizes[0]}, "5-9": {"task_1": sizes[1]}}
    x, _ = stream[0].test.batch(torch.arange(50))
    with torch.no_grad():
        for group, view in (("task_0", "task 0"), ("task_1", "live")):
            module = clkit.load(tmp_path / "run", view=view).module
            assert torch.equal(loaded_elsewhere(tmp_path / "out" / group, x, tmp_path), module(x))


REFUSED = {"moelora": "neither be merged nor loaded by peft", "disco": "a mixture of its own, .* view=live"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kind"), [("ilora", "peft"), ("reglora", "transformers"), ("moelora", ""), ("disco", "")]
)
def test_a_language_model_answers_elsewhere_as_the_method_does(strategy, kind, tmp_path):
    torch.manual_seed(0)
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    about["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(about | {"rope_theta": 50.0}))
    write_tasks(tmp_path / "data" / "instructions", ("sums", "colours"))
    chosen = ["scenario=instructions", "model=causal_lm", f"model.net={tmp_path / 'model'}", "adapter=lora_lm"]
    cheap = ["trainer=cpu", "data.steps=3", "logger=none", "trainer.enable_progress_bar=false", "evaluation.every=3"]
    config = composed(*chosen, *cheap, f"data_root={tmp_path / 'data'}", f"strategy={strategy}")
    run(config, tmp_path / "run", in_sweep=True)
    if not kind:
        with pytest.raises(ConfigurationError, match=REFUSED[strategy]):
            export(tmp_path / "run", tmp_path / "out")
        return
    x = torch.randint(3, 30, (2, 12))
    with torch.no_grad():
        expected = clkit.load(tmp_path / "run").module.net(input_ids=x).logits
    for merge in (False, True):
        out = tmp_path / f"out {merge}"
        export(tmp_path / "run", out, merge=merge)
        assert (out / "adapter_config.json").exists() == (kind == "peft" and not merge)
        assert (out / "generation_config.json").exists() != (out / "adapter_config.json").exists()
        words = json.loads((out / "tokenizer_config.json").read_text())
        assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
        if (out / "config.json").exists():
            assert json.loads((out / "config.json").read_text())["rope_theta"] == 50
        torch.testing.assert_close(loaded_elsewhere(out, x, tmp_path), expected, rtol=1e-4, atol=1e-5)


def test_what_version_5_of_transformers_writes_is_said_in_the_words_of_4_too():
    """Without them version 4 takes a base of 10000 and no scaling, and does not know the class of the tokenizer."""
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    plain = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25}
    old = _with_old_names({"rope_parameters": plain, "text_config": {"rope_parameters": scaled}})
    assert (old["rope_theta"], old["partial_rotary_factor"]) == (1e5, 0.25)
    assert "rope_scaling" not in old
    assert old["rope_parameters"] == plain
    assert old["text_config"]["rope_theta"] == 5e5
    assert old["text_config"]["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
    }
    for untouched in (
        {"model_type": "gpt2"},
        {"rope_parameters": {"full_attention": plain, "sliding_attention": plain}},
    ):
        assert _with_old_names(untouched) == untouched
    words = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    assert _in_old_words(words) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }
    assert _in_old_words({"tokenizer_class": "GPT2Tokenizer"}) == {"tokenizer_class": "GPT2Tokenizer"}
