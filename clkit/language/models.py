"""Models and tokenizers of transformers by name, and a Lightning module around them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.evaluation.token_scores import is_encoder_decoder, positions
from clkit.files import run_folder, write_atomically
from clkit.language.features import TowerFeatures, Where
from clkit.language.images import reader_of
from clkit.language.labelled import labelled_only
from clkit.language.one_mask import one_mask
from clkit.language.packing import packed
from clkit.language.vision import PROJECTORS, for_language_model, vision_parts
from clkit.method.adapters import add_adapter
from clkit.method.learning_rate import LearningRate

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

_ADAMW = functools.partial(torch.optim.AdamW, lr=2e-4, weight_decay=0.0)


def transformers() -> Any:
    """Return the package.

    Raises:
        ConfigurationError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "Language models are those of transformers, which is not installed; run pip install 'clkit[language]'."
        ) from error
    return transformers


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by the name or path of its model, or from a ``.gguf`` file.

    A folder of an adapter without a tokenizer has that of the model below. Without a padding token the one of the end
    stands in; padding is masked.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    base = None if any(Path(name).glob("tokenizer*")) else adapter_base(name)
    tokenizer = load(transformers().AutoTokenizer, base or name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def load(kind: Any, name: str, **options: Any) -> Any:
    """Return ``kind.from_pretrained(name, **options)``; ``name`` may be a ``.gguf`` file.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    import clkit.language.towers  # noqa: F401  # registers a tower with transformers

    path = Path(name)
    try:
        if path.suffix != ".gguf":
            return kind.from_pretrained(name, **options)
        loaded = kind.from_pretrained(path.parent, gguf_file=path.name, **options)
        if isinstance(loaded, nn.Module):
            # the weights are plain numbers now, but transformers would still refuse to save them
            cast(Any, loaded).hf_quantizer = None
            del cast(Any, loaded).config.quantization_config
        return loaded
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(
            f"{kind.__name__} cannot load {name!r}: {str(error).splitlines()[0]} Give a name of the Hugging Face "
            "hub, a folder made by save_pretrained, or a .gguf file."
        ) from error


def adapter_base(name: str) -> str | None:
    """Return the name or path of the model that a folder's adapter of peft is for; ``None`` for other folders."""
    described = Path(name, "adapter_config.json")
    if not described.is_file():
        return None
    try:
        return str(json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"{described} names no base_model_name_or_path ({error}); mend the file.") from error


def load_processor(name: str) -> ProcessorMixin:
    """Load the processor of a model of texts and images by the model's name or path; see :func:`load_tokenizer`.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    base = None if any(Path(name).glob("*processor_config.json")) else adapter_base(name)
    processor = load(transformers().AutoProcessor, base or name)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("ProcessorMixin", processor)


def load_model(kind: Any, name: str, **options: Any) -> Any:
    """As :func:`load`; a folder of an adapter is its model with that adapter, to be trained on.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    base = adapter_base(name)
    if base is None:
        return load(kind, name, **options)
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"{name} holds an adapter of peft, which is not installed; run pip install 'clkit[lora]'."
        ) from error
    return peft.PeftModel.from_pretrained(load(kind, base, **options), name, is_trainable=True)


def describes_encoder_decoder(name: str) -> bool:
    """Tell whether a name or path is that of an encoder-decoder; not where no configuration of a model is there."""
    if Path(name).suffix == ".gguf":
        return False
    try:
        return bool(transformers().AutoConfig.from_pretrained(adapter_base(name) or name).is_encoder_decoder)
    except (OSError, ValueError):
        return False


def check_layout(model: nn.Module, data: Any) -> None:
    """Check that prompts and answers are apart, or one text, as a model needs them.

    Args:
        model: A model of transformers, or a module that holds one.
        data: A dataset; only those that say what they are, as :class:`~clkit.language.dataset.InstructionDataset`
            does, are checked.

    Raises:
        ConfigurationError: If the model needs the other form.
    """
    apart, needed = getattr(data, "encoder_decoder", None), is_encoder_decoder(model)
    if apart is None or apart == needed:
        return
    kind = "an encoder-decoder, whose answers are apart" if needed else "no encoder-decoder, and goes on with a prompt"
    raise ConfigurationError(
        f"{type(model).__name__} is {kind}, but the stream was made with encoder_decoder={apart}; use "
        f"encoder_decoder={needed} (scenario.encoder_decoder={str(needed).lower()})."
    )


def _longest(part: Any) -> int:
    return int(getattr(part, "longest", None) or max(part.lengths))


class LanguageModule(pl.LightningModule):
    """A model of transformers with its own loss and an optimizer.

    Batches are mappings, which the model is called with; they have ``labels``. Logs ``train_loss`` and ``val_loss``.

    Args:
        net: A model of transformers (or of peft, around one); a configuration, for random weights; or the name or path
            of one (also a ``.gguf`` file). The adapter in a folder, as :class:`~clkit.SaveAdapters` writes it, is
            trained on; then there is no other ``adapter``.
        adapter: A configuration of peft, such as :func:`~clkit.method.adapters.lora` makes: everything but the adapter
            and its ``modules_to_save`` is frozen.
        optimizer: Makes the optimizer from the trainable parameters; AdamW with learning rate 2e-4 by default.
        scheduler: A :class:`~clkit.method.learning_rate.LearningRate`, or a callable that makes a scheduler from the
            optimizer; stepped after every optimizer step.
        gradient_checkpointing: Compute activations anew in the backward pass, to save memory.
        dtype: Name of the dtype of the weights, such as ``"bfloat16"``; ``"float32"`` by default. Mixed precision is
            the trainer's: ``Trainer(precision="bf16-mixed")``.
        packing: In place of padding, put samples of a batch into rows of up to so many tokens for the loss, see
            :func:`~clkit.language.packing.packed`; ``None`` pads.
        **options: More arguments of the model's ``from_pretrained`` or ``from_config``.

    Raises:
        ConfigurationError: If the model cannot be loaded, or nothing of it is trainable.
    """

    auto = ""
    packs = False

    def __init__(
        self,
        net: nn.Module | PretrainedConfig | str,
        *,
        adapter: PeftConfig | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = _ADAMW,
        scheduler: LearningRate | Callable[[torch.optim.Optimizer], Any] | None = None,
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
        packing: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if packing is not None:
            check_whole("packing", packing, 1)
            if not self.packs:
                raise ConfigurationError(
                    f"{type(self).__name__} cannot put several samples into a row; use packing=null."
                )
        self.packing = packing
        if "input_shape" in options:
            raise ConfigurationError(
                f"{type(self).__name__} takes texts, but the stream has samples of shape {options['input_shape']}; "
                "choose a scenario of texts, such as instructions, or another model."
            )
        if "n_classes" in options:
            raise ConfigurationError(
                f"{type(self).__name__} writes answers, but the stream has {options['n_classes']} classes; choose a "
                "scenario of instructions, or model=encoder."
            )
        number = getattr(torch, dtype, None)
        if not isinstance(number, torch.dtype) or not number.is_floating_point:
            raise ConfigurationError(f"dtype={dtype!r} is unknown; use float32, bfloat16 or float16.")
        if not isinstance(net, nn.Module):
            auto = getattr(transformers(), self.auto)
            if isinstance(net, str):
                # from_pretrained ends in evaluation mode, without dropout, and Lightning keeps a module's mode
                net = load_model(auto, net, dtype=number, **options).train()
            else:
                try:
                    net = auto.from_config(net, dtype=number, **options)
                except ValueError as error:
                    raise ConfigurationError(
                        f"{self.auto} has no model for a {type(net).__name__}; use another class of clkit's, such as "
                        "CausalLM (model=causal_lm) or Seq2SeqLM (model=seq2seq_lm)."
                    ) from error
        assert isinstance(net, nn.Module)
        self.net: Any = self.adapted(net, adapter)
        self.optimizer, self.scheduler = optimizer, scheduler
        self._sharded = False
        if gradient_checkpointing:
            cast(Any, self.net).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def adapted(self, net: nn.Module, adapter: PeftConfig | None) -> nn.Module:
        """Return the model with its adapter, everything else frozen."""
        return net if adapter is None else add_adapter(net, adapter)

    def groups(self, parameters: list[nn.Parameter]) -> list[Any]:
        """Return what the optimizer is made from: trainable parameters, or groups of them with their own settings."""
        return parameters

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output, with ``logits`` and, where there are ``labels``, ``loss``."""
        return self.net(**inputs)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the model's loss on a batch."""
        with packed(self.net, self.packing), labelled_only(self.net), one_mask():
            return cast(Tensor, self(**batch).loss)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch["labels"]))

    def on_fit_start(self) -> None:
        most = positions(self.net)
        stream = getattr(getattr(self.trainer, "datamodule", None), "stream", ())
        parts = [part for experience in stream for part in (experience.train, experience.test)]
        for part in parts:
            check_layout(self.net, part)
        longest = max((_longest(part) for part in parts if hasattr(part, "lengths")), default=0)
        if most is not None and longest > most:
            raise ConfigurationError(
                f"The longest text has {longest} tokens, but {type(self.net).__name__} has positions for {most}; use "
                f"max_length={most} (scenario.max_length; of raw text length={most}, scenario.length)."
            )

    def configure_model(self) -> None:
        """Shard the weights block by block where the trainer wants it (``trainer=fsdp``)."""
        if self.device_mesh is None or self._sharded:
            return
        from torch.distributed.fsdp import fully_shard

        self._sharded = True
        mesh, blocks = self.device_mesh["data_parallel"], set(self.net._no_split_modules or ())
        for block in [part for part in self.net.modules() if type(part).__name__ in blocks]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ConfigurationError(
                f"No parameter of {type(self.net).__name__} has requires_grad=True, so there is nothing to train; "
                "unfreeze some of them, or give the model an adapter."
            )
        optimizer = self.optimizer(self.groups(parameters))
        if self.scheduler is None:
            return optimizer
        if isinstance(self.scheduler, LearningRate):
            return self.scheduler.configured(self, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


class CausalLM(LanguageModule):
    """Any ``AutoModelForCausalLM`` as a Lightning module; see :class:`LanguageModule`.

    The loss is the mean cross-entropy over the tokens of a batch whose label is not -100. Over several processes, and
    over accumulated batches, it is the mean of these means.
    """

    auto = "AutoModelForCausalLM"
    packs = True


class Seq2SeqLM(LanguageModule):
    """Any ``AutoModelForSeq2SeqLM``, such as T5, as a Lightning module; see :class:`LanguageModule`.

    For streams of instructions with ``encoder_decoder=True``, whose labels are the answers. The loss is the model's
    own: the mean cross-entropy over their tokens.

    Args:
        net: As in :class:`LanguageModule`.
        adapter: As in :class:`LanguageModule`, of ``task_type="SEQ_2_SEQ_LM"`` (``adapter=lora_seq2seq``).
        **options: As in :class:`LanguageModule`.

    Raises:
        ConfigurationError: If the model is no encoder-decoder, or the adapter is for another kind of model.
    """

    auto = "AutoModelForSeq2SeqLM"

    def adapted(self, net: nn.Module, adapter: PeftConfig | None) -> nn.Module:
        if not is_encoder_decoder(net):
            raise ConfigurationError(f"{type(net).__name__} is no encoder-decoder; use CausalLM (model=causal_lm).")
        kind = getattr(adapter, "task_type", None)
        if kind not in (None, "SEQ_2_SEQ_LM"):
            raise ConfigurationError(
                f"The adapter has task_type={str(getattr(kind, 'value', kind))!r}, but {type(net).__name__} is an "
                "encoder-decoder; use task_type='SEQ_2_SEQ_LM' (adapter=lora_seq2seq)."
            )
        return super().adapted(net, adapter)


class VisionLanguage(LanguageModule):
    """Any ``AutoModelForImageTextToText`` as a Lightning module; see :class:`LanguageModule`.

    Batches have ``images`` (:class:`~clkit.data.images.Images`), as streams of texts and images make them; the model
    gets the pixels of each, and text alone where there are none. The loss is that of :class:`CausalLM`.

    Args:
        net: As in :class:`LanguageModule`.
        adapter: As in :class:`LanguageModule`, for the language model alone unless ``tower="adapted"``: modules of the
            same names in the tower or the projector are left as they are.
        tower: The vision tower is ``"frozen"`` and stays in evaluation mode (no dropout, no running statistics); or it
            is ``"adapted"``, by the adapter, or ``"trained"`` as a whole.
        train_projector: Train the projector between tower and language model as a whole (as a part of the adapter, if
            there is one).
        projector_lr: Learning rate of the projector; the optimizer's own when ``None``.
        features: Run a frozen tower once for each image, in training, evaluation and generation, and keep its output in
            ``"memory"`` or on ``"disk"``, see :class:`~clkit.language.features.TowerFeatures`; each time when ``None``.
            At the end of a fit, ``features.json`` in the trainer's folder says what that saved.
        features_limit: Most bytes to keep.
        features_dir: Their folder on disk, which runs may share.
        **options: As in :class:`LanguageModule`. Gradient checkpointing is that of the language model.

    Raises:
        ConfigurationError: If the model has no tower, the projector that is to be trained cannot be found, or features
            are to be kept of a tower that is trained.
    """

    auto = "AutoModelForImageTextToText"
    packs = True

    def __init__(
        self,
        net: nn.Module | PretrainedConfig | str,
        *,
        adapter: PeftConfig | None = None,
        tower: Literal["frozen", "adapted", "trained"] = "frozen",
        train_projector: bool = True,
        projector_lr: float | None = None,
        features: Where | None = None,
        features_limit: int = 4 * 2**30,
        features_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_choice("tower", tower, ("frozen", "adapted", "trained"))
        if projector_lr is not None and not train_projector:
            raise ConfigurationError(
                f"projector_lr={projector_lr} is for a projector that train_projector=false freezes."
            )
        if features is not None and tower != "frozen":
            raise ConfigurationError(
                f"features={features!r} keeps what the tower makes of images, which changes with tower={tower!r}; use "
                "tower='frozen', or features=null."
            )
        self.tower, self.train_projector, self.projector_lr = tower, train_projector, projector_lr
        super().__init__(net, adapter=adapter, **options)
        kept = None if features is None else TowerFeatures(features, limit=features_limit, dir=features_dir)
        self._reader = reader_of(self.net)
        self._reader.features = kept
        self._parts = vision_parts(self.net)
        self.train(self.training)
        for part in self._parts.tower:
            if getattr(part, "gradient_checkpointing", False) and tower == "frozen":
                cast(Any, part).gradient_checkpointing = False

    def adapted(self, net: nn.Module, adapter: PeftConfig | None) -> nn.Module:
        parts = vision_parts(net)
        if self.train_projector and not parts.projector_roots:
            raise ConfigurationError(
                f"{type(net).__name__} has no projector with a known name ({', '.join(PROJECTORS)}); use "
                "train_projector=false."
            )
        if adapter is not None:
            return add_adapter(net, for_language_model(net, adapter, self.tower, self.train_projector))
        if self.tower == "adapted":
            raise ConfigurationError("tower='adapted' is for a model with an adapter; give it one, or use trained.")
        # an adapter that came with the model says itself what is trained
        if not hasattr(net, "get_base_model"):
            for parameter in parts.tower_parameters:
                parameter.requires_grad_(self.tower == "trained")
            for parameter in parts.projector_parameters:
                parameter.requires_grad_(self.train_projector)
        return net

    def groups(self, parameters: list[nn.Parameter]) -> list[Any]:
        if self.projector_lr is None:
            return parameters
        own = set(self._parts.projector_parameters)
        projector = [parameter for parameter in parameters if parameter in own]
        others = [parameter for parameter in parameters if parameter not in own]
        groups = [(others, {}), (projector, {"lr": self.projector_lr})]
        return [{"params": params, **settings} for params, settings in groups if params]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        images = batch.get("images")
        if self._trainer is not None and self._trainer.world_size > 1 and not (images and images.used()):
            # every process has a gradient of every parameter, with images or without
            unused = [*self._parts.projector_parameters, *self._parts.tower_parameters]
            loss = loss + 0.0 * sum(parameter.sum() for parameter in unused if parameter.requires_grad)
        return loss

    def configure_model(self) -> None:
        if self.device_mesh is not None and self._reader.features is not None:
            raise ConfigurationError(
                "The features of a tower are found by its weights, but the trainer shards them; use features=null."
            )
        super().configure_model()

    def on_fit_end(self) -> None:
        features = self._reader.features
        if features is None:
            return
        folder = run_folder(self.trainer)
        if folder is not None and self.trainer.is_global_zero:
            write_atomically(folder / "features.json", json.dumps(features.report(), indent=2) + "\n")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._reader.features is not None:
            checkpoint["features"] = self._reader.features.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._reader.features is not None and "features" in checkpoint:
            self._reader.features.load_state_dict(checkpoint["features"])

    def train(self, mode: bool = True) -> VisionLanguage:
        """Set the mode; a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.tower == "frozen":
            for part in self._parts.tower:
                part.training = False
        return self


class TextClassifier(LanguageModule):
    """Any ``AutoModelForSequenceClassification`` as a Lightning module; see :class:`LanguageModule`.

    Batches have one label a text, ``int64`` ``[B]``; the loss is the cross-entropy.

    Args:
        net: As in :class:`LanguageModule`; the output layer of an encoder by name is new.
        n_classes: Number of outputs.
        **options: As in :class:`LanguageModule`.
    """

    auto = "AutoModelForSequenceClassification"

    def __init__(self, net: nn.Module | PretrainedConfig | str, n_classes: int | None = None, **options: Any) -> None:
        if n_classes is None:
            raise ConfigurationError(
                "TextClassifier needs n_classes, but the stream has no classes; choose a scenario of texts with "
                "classes, such as split_texts, or model=causal_lm."
            )
        if isinstance(net, str):
            options["num_labels"] = n_classes
        elif not isinstance(net, nn.Module):
            net.num_labels = n_classes
        super().__init__(net, **options)
        # decoders look for the last token that is no padding
        config = getattr(self.net, "config", None)
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = getattr(config, "eos_token_id", None) or 0

    def forward(self, **inputs: Tensor) -> Any:
        """Return the model's output, with ``logits`` ``[B, C]`` and, where there are ``labels``, ``loss``."""
        pad = getattr(getattr(self.net, "config", None), "pad_token_id", None)
        if pad is not None and "attention_mask" in inputs:
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
        return self.net(**inputs)
