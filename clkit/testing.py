"""What every strategy must do: a conformance suite for clkit's strategies and anyone else's.

In a test of your package::

    from clkit.testing import CHECKS, check_strategy

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_strategy(check):
        check_strategy(lambda: MyStrategy(), only=[check])
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from clkit.data.datamodule import StreamDataModule, stream_data
from clkit.data.datasets import InMemoryDataset
from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError
from clkit.evaluation.stability_gap import StabilityGap
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.images import ImageBytes, ImageTable
from clkit.language.models import CausalLM, VisionLanguage, transformers
from clkit.language.records import Record
from clkit.method.adapters import lora
from clkit.method.parameters import trainable
from clkit.method.strategy import Strategy
from clkit.run.checkpoint import StreamCheckpoint, checkpoints

__all__ = [
    "CHECKS",
    "SmallModule",
    "check_strategy",
    "small_image_instructions",
    "small_instructions",
    "small_language_module",
    "small_processor",
    "small_stream",
    "small_tokenizer",
    "small_vision_language_module",
]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Build = Callable[[], Strategy | Sequence[pl.Callback]]

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": True,
}


class SmallModule(pl.LightningModule):
    """A classifier of vectors that knows nothing of clkit: 6 inputs, 16 hidden units, 6 classes, SGD with momentum.

    Args:
        noisy: With BatchNorm and dropout.
        manual: Optimizes by hand.
    """

    def __init__(self, noisy: bool = False, manual: bool = False) -> None:
        super().__init__()
        middle = [nn.BatchNorm1d(16), nn.Dropout(0.3)] if noisy else []
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), *middle, nn.ReLU(), nn.Linear(16, 6))
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["labels"]) if isinstance(batch, dict) else batch[:2]
        loss = cross_entropy(self(x), y)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


def small_stream(n_experiences: int = 3, per_class: int = 24, mapping: bool = False) -> Stream:
    """Build a stream of Gaussian clusters in 6 dimensions, two classes an experience.

    Args:
        n_experiences: Number of experiences, at most 3.
        per_class: Training and test samples of each class.
        mapping: Samples are mappings of ``x`` and ``labels``, not pairs.
    """
    generator = torch.Generator().manual_seed(0)
    sets: list[list[Any]] = [[], []]
    for k in range(n_experiences):
        for part in sets:
            y = torch.tensor([2 * k, 2 * k + 1]).repeat_interleave(per_class)
            x = torch.randn(len(y), 6, generator=generator)
            x[torch.arange(len(y)), y] += 2
            pairs = InMemoryDataset(x, y)
            part.append([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)] if mapping else pairs)
    if not mapping:
        return Stream.from_datasets(*sets, n_classes=6)
    experiences = [
        Experience(k, f"E{k}", train, test, classes=(2 * k, 2 * k + 1))
        for k, (train, test) in enumerate(zip(*sets, strict=True))
    ]
    return Stream(experiences, name="mappings", kind="class-incremental", n_classes=6)


_TEXT = """what is plus minus the sum of name colour yes no true false red green blue pick say answer option one two
three A B C D ( ) : . , ? ! <user> <assistant> <system>"""
_WORDS = ["<unk>", "<s>", "</s>", *_TEXT.split(), *map(str, range(40))]
_TEMPLATE = """{%- for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}
{%- if m['role'] == 'assistant' %}{{ ' </s> ' }}{% else %}{{ ' ' }}{% endif %}{% endfor -%}
{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif -%}"""


def small_tokenizer(chat: bool = True) -> PreTrainedTokenizerBase:
    """Build a tokenizer of few words, one token each; needs ``pip install clkit[language]``.

    Args:
        chat: With a chat template.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers().PreTrainedTokenizerFast
    built = fast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if chat:
        built.chat_template = _TEMPLATE
    return cast("PreTrainedTokenizerBase", built)


def small_language_module(**options: Any) -> CausalLM:
    """Build a two-layer Llama with random weights and LoRA for :func:`small_instructions`; SGD with momentum.

    Args:
        **options: More arguments of :class:`~clkit.language.models.CausalLM`.
    """
    config = transformers().LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    adapter = lora(4, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM")
    optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return CausalLM(config, **{"adapter": adapter, "optimizer": optimizer, **options})


def small_instructions(n_experiences: int = 3, n: int = 24) -> Stream:
    """Build a stream of instruction tasks: to repeat a colour, an option or a number.

    Args:
        n_experiences: Number of experiences, at most 3.
        n: Training samples of each; half as many are held out.
    """
    tasks = {
        "colours": ("name the colour :", ["red", "green", "blue"]),
        "options": ("pick option of ( A B C ) :", ["A", "B", "C"]),
        "numbers": ("what is plus two of :", [str(number) for number in range(12)]),
    }
    tokenizer, experiences = small_tokenizer(), []
    for k, (name, (asks, answers)) in enumerate(list(tasks.items())[:n_experiences]):
        parts: list[Any] = []
        for size, first in ((n, 0), (n // 2, 1)):
            chosen = [answers[(first + 5 * i) % len(answers)] for i in range(size)]
            texts = [f"{asks} {' '.join([answer] * (1 + i % 4))}" for i, answer in enumerate(chosen)]
            records = [
                Record((("user", text),), answer, {"instruction": asks})
                for text, answer in zip(texts, chosen, strict=True)
            ]
            data = InstructionDataset(records, tokenizer)
            parts.append(data.for_scores() if parts else data)
        experiences.append(Experience(k, name, *parts))
    return Stream(experiences, name="instructions", kind="instruction", collate_fn=Pad())


def small_processor(chat: bool = True) -> ProcessorMixin:
    """Build a processor of :func:`small_tokenizer` and images of 16 pixels, which take 4 tokens each.

    Args:
        chat: With a chat template.
    """
    tokenizer = small_tokenizer(chat)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    images = transformers().CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return cast("ProcessorMixin", transformers().LlavaProcessor(images, tokenizer, **settings))


def small_vision_language_module(**options: Any) -> VisionLanguage:
    """Build a LLaVA with random weights, two layers in its tower and two in its language model, and LoRA; SGD.

    For :func:`small_image_instructions`.

    Args:
        **options: More arguments of :class:`~clkit.language.models.VisionLanguage`.
    """
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": len(_WORDS) + 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = transformers().LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **layers},
        text_config={"model_type": "llama", "max_position_embeddings": 128, **layers, **words},
        image_token_index=len(_WORDS),
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    adapter = lora(4, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM")
    optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return VisionLanguage(config, **{"adapter": adapter, "optimizer": optimizer, **options})


def small_image_instructions(n_experiences: int = 3, n: int = 24) -> Stream:
    """Build a stream of instruction tasks about images of one colour each, some of them about two, some about none.

    Args:
        n_experiences: Number of experiences, at most 3.
        n: Training samples of each; half as many are held out.
    """
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    table, experiences = ImageTable(small_processor()), []
    for k, (name, asks) in enumerate([("colours", "name the colour"), ("options", "pick"), ("numbers", "say")]):
        parts: list[Any] = []
        for size, first in ((n, 0), (n // 2, 100)):
            records = []
            for i in range(first, first + size):
                shown = [list(colours)[(i + j) % 3] for j in range((1, 2, 1, 0)[i % 4])]
                answer = (*shown, "no")[0]
                images = [_one_colour(f"{name} {i} {j}", colours[colour], i) for j, colour in enumerate(shown)]
                extra = {"instruction": asks}
                records.append(Record((("user", f"{asks} {' '.join(['of'] * (i % 4))} :"),), answer, extra, (*images,)))
            data = InstructionDataset(records, table.processor, images=table)
            parts.append(data.for_scores() if parts else data)
        experiences.append(Experience(k, name, *parts))
    return Stream(
        experiences[:n_experiences], name="image instructions", kind="instruction", collate_fn=Pad("right", table)
    )


def _one_colour(name: str, colour: tuple[int, int, int], seed: int) -> ImageBytes:
    """An image of about one colour."""
    noise = np.random.default_rng(seed).integers(-20, 20, (16, 16, 3))
    content = BytesIO()
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(content, "PNG")
    return ImageBytes(name, content.getvalue())


class _Suite:
    def __init__(
        self,
        build: Build,
        module: Callable[[], pl.LightningModule] | None,
        stream: Callable[[], Stream],
        batch_size: int,
        state_limit: int | None,
    ) -> None:
        self._build, self._module, self._stream = build, module, stream
        self.batch_size, self.state_limit = batch_size, state_limit

    def strategies(self) -> list[Any]:
        built = self._build()
        return list(built) if isinstance(built, Sequence) else [built]

    def module(self, **settings: Any) -> pl.LightningModule:
        torch.manual_seed(0)
        return SmallModule(**settings) if self._module is None else self._module()

    def fit(
        self,
        *,
        strategies: Sequence[pl.Callback] | None = None,
        module: pl.LightningModule | None = None,
        callbacks: Sequence[pl.Callback] = (),
        stream: Stream | None = None,
        batch_size: int | None = None,
        checkpoint: Path | None = None,
        search: bool = False,
        after: Path | None = None,
        **settings: Any,
    ) -> pl.LightningModule:
        module = self.module() if module is None else module
        size = batch_size or self.batch_size
        data = StreamDataModule(stream or self._stream(), batch_size=size, epochs=2, after=after)
        chosen = self.strategies() if strategies is None else strategies
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.seed_everything(0, verbose=False)
            trainer = pl.Trainer(
                max_epochs=data.total_epochs,
                default_root_dir=folder,
                callbacks=[*chosen, *callbacks],
                **{**_QUIET, **settings},
            )
            if search:
                Tuner(trainer).lr_find(module, datamodule=data, num_training=3, update_attr=False)
                pl.seed_everything(0, verbose=False)
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module

    def resume(self) -> None:
        """Resumed from any checkpoint, with fresh objects, the run ends in the same bits."""
        noisy = {} if self._module is not None else {"noisy": True}
        with tempfile.TemporaryDirectory() as folder:
            saves = StreamCheckpoint(Path(folder), every_n_steps=4, keep=99)
            first = self.strategies()
            whole = self.fit(strategies=first, module=self.module(**noisy), callbacks=[saves])
            for path in checkpoints(Path(folder)):
                again = self.strategies()
                module = self.fit(strategies=again, module=self.module(**noisy), checkpoint=path)
                _same(whole.state_dict(), module.state_dict(), f"weights after a resume from {path.name}")
                own, resumed = ([s.state_dict() for s in strategies] for strategies in (first, again))
                _same(own, resumed, f"the strategy's state after a resume from {path.name}")

    def growth(self) -> None:
        """A stream of two experiences that goes on with a third, then known, ends in the bits of one of three.

        So does a run that branches off at the end of the first, with the settings that it had.
        """
        noisy = {} if self._module is not None else {"noisy": True}
        stream = self._stream()
        with tempfile.TemporaryDirectory() as folder:
            first, saves = self.strategies(), StreamCheckpoint(Path(folder, "whole"), keep_ends="whole")
            whole = self.fit(strategies=first, module=self.module(**noisy), callbacks=[saves], stream=stream)
            short = StreamCheckpoint(Path(folder, "short"))
            self.fit(module=self.module(**noisy), callbacks=[short], stream=stream[:2])
            branch = Path(folder, "whole", "end=000.ckpt")
            for path, after in ((checkpoints(Path(folder, "short"))[0], None), (branch, branch)):
                again = self.strategies()
                module = self.module(**noisy)
                self.fit(strategies=again, module=module, stream=stream, checkpoint=path, after=after)
                how = "a stream that grew" if after is None else "branching off"
                _same(whole.state_dict(), module.state_dict(), f"weights after {how}")
                own, later = ([s.state_dict() for s in strategies] for strategies in (first, again))
                _same(own, later, f"the strategy's state after {how}")

    def late(self) -> None:
        """Where it leaves the first experience as it is, it can begin at its end, to the same bits.

        What it begins with is a run of the first experience by a trainer without it.
        """
        stream = self._stream()
        if not all(strategy.leaves_first(stream) for strategy in self.strategies()):
            return
        noisy = {} if self._module is not None else {"noisy": True}
        with tempfile.TemporaryDirectory() as folder:
            first, end = self.strategies(), Path(folder, "end=000.ckpt")
            whole = self.fit(strategies=first, module=self.module(**noisy), stream=stream)
            saves = StreamCheckpoint(Path(folder), keep_ends="whole")
            self.fit(strategies=[], module=self.module(**noisy), callbacks=[saves], stream=stream)
            again, module = self.strategies(), self.module(**noisy)
            self.fit(strategies=again, module=module, stream=stream, checkpoint=end, after=end)
            _same(whole.state_dict(), module.state_dict(), "weights where it begins after the first experience")
            own, later = ([s.state_dict() for s in strategies] for strategies in (first, again))
            _same(own, later, "the strategy's state where it begins after the first experience")

    def fresh(self) -> None:
        """A second fit, after a learning-rate search, ends in the same bits as the first."""
        strategies = self.strategies()
        first = self.fit(strategies=strategies)
        left = copy.deepcopy([strategy.state_dict() for strategy in strategies])
        second = self.fit(strategies=strategies, search=True)
        _same(first.state_dict(), second.state_dict(), "weights after a second fit with the same object")
        _same(left, [strategy.state_dict() for strategy in strategies], "its state after a second fit")

    def batch(self) -> None:
        """It sees and remembers the batches of the stream, whatever ``training_step`` does to its own."""
        module = self.module()
        own_step = type(module).training_step
        given: list[Any] = []

        class Spoils(type(module)):  # type: ignore[misc]
            def training_step(self, batch: Any, *args: Any) -> Any:
                given.extend(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
                output = own_step(self, batch, *args)
                if isinstance(batch, dict):
                    batch.clear()
                return output

            def on_after_backward(self) -> None:
                # not before: the backward pass needs the inputs
                while given:
                    given.pop().zero_()

        plain = self.fit(module=self.module())
        module.__class__ = Spoils
        spoilt = self.fit(module=module)
        _same(plain.state_dict(), spoilt.state_dict(), "weights where training_step spoils its batch")

    def order(self) -> None:
        """What others remember at an experience's end is what the next one starts from."""
        probe = _Remembers()
        self.fit(strategies=[probe, *self.strategies()])
        ends = probe.at_ends[: len(probe.at_starts)]
        _same(ends, probe.at_starts, "weights that the next experience starts from")

    def evaluation(self) -> None:
        """Training with per-iteration evaluation ends in the same bits as without."""
        noisy = {} if self._module is not None else {"noisy": True}
        with tempfile.TemporaryDirectory() as folder:
            score = "token_accuracy" if self._stream().kind == "instruction" else "accuracy"
            gap = StabilityGap(every=1, subset=10, score=score, dir=folder, plot=False)
            evaluated = self.fit(module=self.module(**noisy), callbacks=[gap])
        _same(self.fit(module=self.module(**noisy)).state_dict(), evaluated.state_dict(), "weights with evaluation on")

    def processes(self) -> None:
        """Two processes (DDP) end near one process with the same global batch, and agree with each other."""
        one = self.fit(batch_size=2 * self.batch_size)
        two = self.fit(devices=2, strategy="ddp_fork")
        start = dict(self.module().named_parameters())
        assert any(not torch.equal(p, start[name]) for name, p in two.named_parameters()), "two processes: no training"
        torch.testing.assert_close(
            dict(two.named_parameters()),
            dict(one.named_parameters()),
            rtol=1e-3,
            atol=1e-4,
            msg=_words("two processes"),
        )

    def accumulation(self) -> None:
        """It trains with two batches a step, and takes half the steps."""
        steps = _Steps()
        module = self.fit(callbacks=[steps], accumulate_grad_batches=2)
        assert steps.taken == steps.planned, (
            f"{steps.taken} optimizer steps in place of {steps.planned} with accumulated gradients"
        )
        _finite(module, "with accumulated gradients")

    def bf16(self) -> None:
        """It trains in bf16 mixed precision and leaves float32 weights."""
        module = self.fit(precision="bf16-mixed")
        _finite(module, "in bf16")
        assert all(p.dtype == torch.float32 for p in module.parameters()), "weights are no longer float32 after bf16"

    def state(self) -> None:
        """The state loads with ``weights_only=True``, and is no larger than documented."""
        strategies, sizes = self.strategies(), _Sizes()
        sizes.strategies = strategies
        self.fit(strategies=strategies, callbacks=[sizes])
        buffer = io.BytesIO()
        torch.save([strategy.state_dict() for strategy in strategies], buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
        if self.state_limit is not None:
            assert max(sizes.bytes) <= self.state_limit, (
                f"the state takes {max(sizes.bytes)} bytes, more than the {self.state_limit} documented"
            )

    def untouched(self) -> None:
        """Afterwards nothing is frozen that was not, modes are as before, and ``training_step`` is the module's own."""
        module = self.module()
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        names = {name for name, _ in module.named_modules()}
        own = module.__dict__.get("training_step")
        self.fit(module=module)
        after = {name: p.requires_grad for name, p in module.named_parameters()}
        assert after == flags, f"requires_grad changed: {sorted(n for n in after if after[n] != flags.get(n))}"
        assert {name for name, _ in module.named_modules()} == names, "modules were added or removed"
        assert module.__dict__.get("training_step") is own, "training_step is still replaced"

    def refusals(self) -> None:
        """What it cannot work with is a ConfigurationError: other data, manual optimization, mappings as batches."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(max_epochs=1, callbacks=self.strategies(), **_QUIET)
            refused = ""
            try:
                trainer.fit(self.module(), DataLoader(self._stream()[0].train))
            except ConfigurationError as error:
                refused = str(error)
        if "datamodule" not in refused:
            raise AssertionError(f"data without a stream must be refused with what to do; {refused!r} was said")
        for wanted, arguments in (
            ("manual optimization", {"stream": small_stream, "module": lambda: SmallModule(manual=True)}),
            ("mappings as batches", {"stream": lambda: small_stream(mapping=True), "module": SmallModule}),
        ):
            try:
                module = self.fit(**{name: make() for name, make in arguments.items()})  # type: ignore[operator]
            except ConfigurationError:
                continue
            except Exception as error:
                raise AssertionError(f"{wanted}: {type(error).__name__} ({error}) in place of a refusal") from error
            _finite(module, f"with {wanted}")


class _Remembers(Strategy):
    def __init__(self) -> None:
        self.at_ends: list[Mapping[str, Tensor]] = []
        self.at_starts: list[Mapping[str, Tensor]] = []

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        if experience.index > 0:
            self.at_starts.append(copy.deepcopy(trainable(module)))

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        self.at_ends.append(copy.deepcopy(trainable(module)))


class _Steps(pl.Callback):
    taken = planned = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.taken, self.planned = trainer.global_step, stream_data(trainer).total_steps


class _Sizes(pl.Callback):
    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.strategies: Sequence[Any] = ()

    def on_train_batch_end(self, *args: Any) -> None:
        leaves = itertools.chain.from_iterable(tree_leaves(strategy.state_dict()) for strategy in self.strategies)
        self.bytes.append(sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)))


def _same(expected: Any, actual: Any, what: str) -> None:
    left, right = tree_leaves(expected), tree_leaves(actual)
    equal = len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )
    assert equal, f"{what}: not the same bits"


def _finite(module: nn.Module, what: str) -> None:
    bad = [name for name, p in module.named_parameters() if not p.isfinite().all()]
    assert not bad, f"{what}: {', '.join(bad)} not finite"


def _words(what: str) -> Callable[[str], str]:
    return lambda text: f"{what}: {text}"


CHECKS = (
    "resume",
    "growth",
    "late",
    "fresh",
    "batch",
    "order",
    "evaluation",
    "processes",
    "accumulation",
    "bf16",
    "state",
    "untouched",
    "refusals",
)
"""The checks, each a line in the documentation of :func:`check_strategy`."""


def check_strategy(
    build: Build,
    *,
    module: Callable[[], pl.LightningModule] | None = None,
    stream: Callable[[], Stream] = small_stream,
    batch_size: int = 8,
    state_limit: int | None = None,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> None:
    """Check that a strategy keeps clkit's promises, on a small real stream; seconds on one CPU core.

    - ``resume``: from every checkpoint of a run, with fresh objects, in the same bits;
    - ``growth``: a stream that grows by an experience, and a run that branches off at an experience's end, in the same
      bits as one run of all;
    - ``late``: begun at the end of a first experience that it leaves as it is (``leaves_first``), in the same bits;
    - ``fresh``: a second fit with the same object, after a learning-rate search, in the same bits as the first;
    - ``batch``: it sees the stream's batches, whatever ``training_step`` does to them;
    - ``order``: what others remember at an experience's end is what the next one starts from (``at_end``);
    - ``evaluation``: per-iteration evaluation on or off, the same bits;
    - ``processes``: two processes give what one gives with the same global batch (needs ``fork``);
    - ``accumulation`` and ``bf16``: it trains, with the right number of steps and float32 weights;
    - ``state``: loads with ``weights_only=True``, never above ``state_limit``;
    - ``untouched``: no parameter left frozen, no module or ``training_step`` left replaced;
    - ``refusals``: a ``ConfigurationError`` where it cannot work, no other exception.

    Args:
        build: Makes the strategy afresh, or a list of callbacks with it.
        module: Makes the module for the stream from the global seed; :class:`SmallModule` by default, of 6 inputs and 6
            classes.
        stream: Makes the stream; for strategies of language models :func:`small_instructions`, with
            ``module=small_language_module``.
        batch_size: Samples in a batch.
        state_limit: Most bytes of tensors in the state, as the strategy documents.
        only: Run these of :data:`CHECKS` only.
        skip: Leave these out, because the strategy's documentation says so.

    Raises:
        AssertionError: If a check fails; the message says which and how.
        ValueError: If a check is unknown.
    """
    unknown = {*(only or ()), *skip} - set(CHECKS)
    if unknown:
        raise ValueError(f"unknown checks {', '.join(sorted(unknown))}; known: {', '.join(CHECKS)}")
    suite = _Suite(build, module, stream, batch_size, state_limit)
    for name in only or CHECKS:
        if name not in skip:
            try:
                getattr(suite, name)()
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
