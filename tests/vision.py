"""Small models of texts and images of five families, random weights, and their processors, made without a network."""

from __future__ import annotations

import functools
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from clkit.language.images import ImageBytes
from clkit.language.records import Record

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SENTENCES = ["what is in the image ? a red star, blue circle. yes no A B C describe the picture [0.12, 0.34]\n"]
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_CLIP = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "num_hidden_layers": 3, **_LAYERS}


def tokenizer(special: list[str], **settings: Any) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    marks = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=marks)
    )
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=special, **ends, **settings
    )


def llava() -> tuple[Any, Any]:
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return _llava(transformers.LlavaProcessor, transformers.LlavaConfig, images, {})


def llava_next() -> tuple[Any, Any]:
    grid: dict[str, Any] = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    size = {"height": 32, "width": 32}
    images = transformers.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=size, **grid)
    return _llava(transformers.LlavaNextProcessor, transformers.LlavaNextConfig, images, grid)


def _llava(kind: Any, config: Any, images: Any, more: dict[str, Any]) -> tuple[Any, Any]:
    own = tokenizer(["<image>"])
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = kind(images, own, chat_template=TEMPLATE.replace("IMAGE", "<image>"), **settings)
    return processor, config(
        vision_config=_CLIP,
        text_config={"model_type": "llama", "vocab_size": len(own), **_TEXT},
        image_token_index=processor.image_token_id,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **more,
    )


def qwen2_vl() -> tuple[Any, Any]:
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    names |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    own = tokenizer(list(names.values()))
    patches = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(min_pixels=32**2, max_pixels=64**2, **patches),
        own,
        transformers.Qwen2VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return processor, transformers.Qwen2VLConfig(
        vision_config={**tower, "patch_size": 8, "temporal_patch_size": 2},
        text_config={"vocab_size": len(own), **_TEXT, "rope_parameters": rope},
        **{f"{name}_token_id": own.convert_tokens_to_ids(token) for name, token in names.items()},
    )


def idefics3(smol: bool = False) -> tuple[Any, Any]:
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    names |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    grid = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    own = tokenizer([*names.values(), *grid], **({"extra_special_tokens": names} if smol else {}))
    sizes: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    more: dict[str, Any] = {"image_seq_len": 4, "chat_template": TEMPLATE.replace("IMAGE", "<image>")}
    if smol:
        pytest.importorskip("num2words")
        frames = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 64}}
        videos = transformers.SmolVLMVideoProcessor(**sizes, video_sampling=frames)
        processor = transformers.SmolVLMProcessor(transformers.SmolVLMImageProcessor(**sizes), own, videos, **more)
    else:
        processor = transformers.Idefics3Processor(transformers.Idefics3ImageProcessor(**sizes), own, **more)
    config = transformers.SmolVLMConfig if smol else transformers.Idefics3Config
    return processor, config(
        vision_config={"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, **_LAYERS},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **_TEXT},
        scale_factor=2,
        image_token_id=own.convert_tokens_to_ids("<image>"),
    )


def internvl() -> tuple[Any, Any]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    own = tokenizer(list(names.values()), extra_special_tokens=names)
    size = {"height": 32, "width": 32}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3),
        own,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    return processor, transformers.InternVLConfig(
        vision_config={"image_size": [32, 32], "patch_size": [8, 8], "num_hidden_layers": 2, **_LAYERS},
        text_config={"model_type": "qwen2", "vocab_size": len(own), **_TEXT},
        image_token_id=own.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )


FAMILIES = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "idefics3": idefics3,
    "smolvlm": functools.partial(idefics3, smol=True),
    "internvl": internvl,
}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def in_memory(size: tuple[int, int], seed: int = 0) -> ImageBytes:
    content = BytesIO()
    picture(size, seed).save(content, "PNG")
    return ImageBytes(f"{size} {seed}", content.getvalue())


def save_picture(path: Path, size: tuple[int, int], seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(size, seed).save(path, **options)
    return path


def some_records() -> list[Record]:
    """One, two and no images, of different sizes, answers of different lengths."""
    a, b, c = in_memory((32, 32), 1), in_memory((90, 40), 2), in_memory((40, 90), 3)

    def asked(text: str, answer: str, *images: ImageBytes) -> Record:
        return Record((("user", text),), answer, images=images)

    return [
        asked("what is in the image ?", "a red star", a),
        asked("what is in <image> and <image> ?", "yes", b, c),
        asked("yes or no ?", "no no"),
        asked("describe the picture", "blue circle.", b),
    ]
