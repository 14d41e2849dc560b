"""Low-rank adapters: peft's layers, found in any module, merged and started anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clkit.data.datamodule import stream_data
from clkit.data.hooks import callbacks_of
from clkit.data.stream import Experience, Stream
from clkit.distributed import need_whole_weights
from clkit.errors import ConfigurationError, check_whole
from clkit.files import result_folder, unfinished_name
from clkit.method.optimizer import forget_state
from clkit.method.strategy import Strategy, views_of
from clkit.rng import private_rng

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "Adapters are peft's, which is not installed; run pip install 'clkit[lora]'."
        ) from error
    return peft


def lora(
    rank: int = 8,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = r".*attn\.(qkv|proj)",
    modules_to_save: Sequence[str] | None = ("head",),
    **options: Any,
) -> PeftConfig:
    """Return a ``peft.LoraConfig``; the defaults fit timm's vision transformers.

    Args:
        rank: Rank of the updates, at least 1.
        alpha: The update's scaling is ``alpha / rank``; twice the rank when ``None``.
        dropout: Dropout before the adapter, in [0, 1).
        target_modules: Names (ends of paths) of the layers to adapt, or one regular expression of whole paths.
        modules_to_save: Names of modules that are trained as a whole, such as a new head.
        **options: More fields of ``peft.LoraConfig``.

    Raises:
        ConfigurationError: If peft is not installed, or a value is out of range.
    """
    check_whole("rank", rank, 1)
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout={dropout} is not possible; use a number from 0 to below 1.")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    saved = None if modules_to_save is None else list(modules_to_save)
    settings: dict[str, Any] = {
        **{"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "lora_dropout": dropout},
        **{"target_modules": targets, "modules_to_save": saved, **options},
    }
    try:
        return cast("PeftConfig", _peft().LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"peft.LoraConfig refuses its settings: {error}.") from error


def add_adapter(net: nn.Module, config: PeftConfig) -> PeftModel:
    """Freeze a network and give it an adapter.

    Args:
        net: Any network: timm's, torchvision's, a transformers model or your own.
        config: peft's, such as ``peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])``.

    Returns:
        The network as a ``peft.PeftModel``; its ``forward`` is the network's.

    Raises:
        ConfigurationError: If peft is not installed, the network has an adapter, or the configuration does not fit it.
    """
    peft = _peft()
    if has_adapter(net):
        raise ConfigurationError(
            f"{type(net).__name__} has an adapter already, which another one would replace; leave adapter out "
            "(adapter=null) to go on with it, or give the network without it."
        )
    saved = getattr(config, "modules_to_save", None) or ()
    names = [name for name, _ in net.named_modules() if name]
    missing = [wanted for wanted in saved if not any(name.split(".")[-1] == wanted or name == wanted for name in names)]
    if missing:
        raise ConfigurationError(
            f"modules_to_save={list(saved)}: {type(net).__name__} has no module {missing[0]!r}; its top ones are "
            f"{', '.join(name for name, _ in net.named_children())}."
        )
    try:
        return cast("PeftModel", peft.get_peft_model(net, config))
    except (ValueError, TypeError, NotImplementedError) as error:
        layers = [f"{name} ({type(layer).__name__})" for name, layer in net.named_modules() if _fits(layer)]
        shown = ", ".join(layers[-6:]) or "none"
        raise ConfigurationError(
            f"peft cannot adapt {type(net).__name__}: {str(error).splitlines()[0]} Layers that take LoRA are, among "
            f"others: {shown}."
        ) from error


def has_adapter(net: nn.Module) -> bool:
    """Tell whether a network has layers of peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) for layer in net.modules())


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))


@dataclass(frozen=True)
class LowRank:
    r"""The active LoRA adapter of one layer; the layer's update is :math:`s B A` with ``scaling`` :math:`s`.

    Args:
        name: Path of the layer in the module.
        layer: peft's layer.
        adapter: Name of the adapter.
    """

    name: str
    layer: LoraLayer
    adapter: str

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters that hold ``B`` and ``A``, in peft's own shapes."""
        layer = self.layer
        if self.adapter in layer.lora_embedding_A:
            return layer.lora_embedding_B[self.adapter], layer.lora_embedding_A[self.adapter]
        b, a = layer.lora_B[self.adapter], layer.lora_A[self.adapter]
        return cast(nn.Parameter, b.weight), cast(nn.Parameter, a.weight)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``B`` ``[m, r]`` and ``A`` ``[r, n]``, views; ``n`` is ``in`` or, for convolutions, ``in * kernel``."""
        b, a = self.weights
        return b.flatten(1), a.flatten(1)

    def merge(self, generator: torch.Generator) -> None:
        """Add the update to the layer's own weight, and start anew: ``B = 0`` and ``A`` random (peft's own ways)."""
        base = self.layer.get_base_layer()
        cast(Any, self.layer).merge(adapter_names=[self.adapter])
        self.layer.merged_adapters.clear()
        self.renew(generator)
        # peft writes through .data, which caches of frozen layers' outputs cannot see
        for parameter in base.parameters(recurse=False):
            torch.autograd.graph.increment_version(parameter)

    def renew(self, generator: torch.Generator) -> None:
        """Start anew: ``B = 0`` and ``A`` random (peft's own ways)."""
        with _on_cpu(self.weights), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            cast(Any, self.layer).reset_lora_parameters(self.adapter, init_lora_weights=True)
            generator.set_state(torch.get_rng_state())


@contextmanager
def _on_cpu(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hold parameters on the CPU inside the context: what is drawn for them then depends on no device."""
    own = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.cpu()
    try:
        yield
    finally:
        for parameter, there in zip(parameters, own, strict=True):
            parameter.data = there.copy_(parameter.data)


def lora_layers(module: nn.Module) -> list[LowRank]:
    """Find the layers of a module that have an active, trainable LoRA adapter, and can be merged with it.

    Raises:
        ConfigurationError: If peft is not installed, there is none, several are active in one layer, the adapter is a
            variant whose update is not a product of two matrices (DoRA, grouped convolutions), or the layer's weight is
            another layer's too, or quantized.
    """
    _peft()
    from peft.tuners.lora import LoraLayer

    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        there = {*layer.lora_A, *layer.lora_embedding_A}
        active = [adapter for adapter in layer.active_adapters if adapter in there]
        if len(active) > 1:
            raise ConfigurationError(
                f"{name} has several active adapters ({', '.join(active)}); activate one with set_adapter(NAME)."
            )
        if not active:
            continue
        base = layer.get_base_layer()
        if active[0] in layer.lora_variant or getattr(base, "groups", 1) != 1:
            raise ConfigurationError(
                f"The adapter of {name} is no plain LoRA (DoRA or another variant, or a grouped convolution), so its "
                "update is no product B A; use a LoraConfig without variants."
            )
        entry = LowRank(name, layer, active[0])
        weight = cast(Tensor, base.weight)
        if len(owners[id(weight)]) > 1:
            raise ConfigurationError(
                f"{' and '.join(owners[id(weight)])} share one weight, and merging the adapter of one of them would "
                "change the other; leave it out of target_modules, or untie the weights (tie_word_embeddings=False)."
            )
        if not weight.is_floating_point():
            raise ConfigurationError(
                f"The weight of {name} is {weight.dtype}: merging an adapter into quantized weights rounds it away; "
                "load the model unquantized."
            )
        if all(parameter.requires_grad for parameter in entry.weights):
            found.append(entry)
    if not found:
        raise ConfigurationError(
            f"{type(module).__name__} has no trainable LoRA layer; give the network an adapter: "
            "Classifier(net, adapter=peft.LoraConfig(...)), or peft.get_peft_model in your own module."
        )
    return found


def merge_adapters(layers: list[LowRank], *seeds: int) -> None:
    """Merge every layer's adapter and start a new one, whose random numbers are a function of ``seeds`` alone."""
    generator = _generator(*seeds)
    with torch.no_grad():
        for entry in layers:
            entry.merge(generator)


def renew_adapters(layers: list[LowRank], *seeds: int) -> None:
    """Start a new adapter in every layer, whose random numbers are a function of ``seeds`` alone."""
    generator = _generator(*seeds)
    with torch.no_grad():
        for entry in layers:
            entry.renew(generator)


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(private_rng(*seeds).integers(2**31)))


class AdapterPerExperience(Strategy):
    """A strategy that gives each experience a LoRA adapter of its own, and merges it into the weights afterwards.

    After an experience (before the next one, or at the end of the fit) it calls :meth:`remember`, merges the adapters,
    starts new ones and drops the optimizer's momentum of the old ones. The module must hold plain LoRA adapters of
    peft; those in training are merged. A merge keeps the function to the precision of the weights' dtype: bfloat16
    rounds small updates.

    Args:
        seed: Seed of the new adapters.

    Attributes:
        layers: The adapted layers, from the start of the fit.
    """

    renews_weights = True
    changes_frozen = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.layers: list[LowRank] = []
        self._last: int | None = None

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def remember(self, index: int) -> None:
        """Called right before the adapters of experience ``index`` are merged."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.layers = lora_layers(pl_module)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        # a stream that has grown goes on after its last experience
        self._last = None
        if experience.index > 0:
            self._finish(experience.index - 1)
            forget_state(trainer, [parameter for entry in self.layers for parameter in entry.weights])

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._last = experience.index if experience.index == len(stream_data(trainer).stream) - 1 else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:
            self._finish(self._last)
            self._last = None

    @torch.no_grad()
    def _finish(self, index: int) -> None:
        self.remember(index)
        merge_adapters(self.layers, self.seed, 21, index)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = state_dict["last"]


def adapter_models(module: nn.Module) -> Iterator[tuple[str, PeftModel]]:
    """Yield the peft models inside a module with their paths.

    Raises:
        ConfigurationError: If there is none.
    """
    peft = _peft()
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, peft.PeftModel)]
    if not found:
        raise ConfigurationError(
            f"{type(module).__name__} holds no peft.PeftModel, so there is no adapter to save; make one with "
            "Classifier(net, adapter=peft.LoraConfig(...)) or peft.get_peft_model."
        )
    yield from cast(Any, found)


def knows_layers(model: PeftModel) -> bool:
    """Tell whether peft knows what the adapter's layers are: not where a strategy made experts of them, say."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    variants = [variant for layer in layers for variant in layer.lora_variant.values()]
    return all(type(variant).__module__.startswith("peft.") for variant in variants)


def unsaved(model: PeftModel) -> list[str]:
    """Return what training changes of a model and peft's ``save_pretrained`` leaves out, by name."""
    from peft.utils import ModulesToSaveWrapper

    saved = {tensor.data_ptr() for tensor in _peft().get_peft_model_state_dict(model).values()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    copied = [part for part in model.modules() if isinstance(part, ModulesToSaveWrapper)]
    inside = {id(part) for wrapper in copied for part in wrapper.modules()}
    return lost + [
        f"the running statistics of {n}"
        for n, part in model.named_modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats and part.training and id(part) not in inside
    ]


def _check_saved(model: PeftModel) -> None:
    """Refuse a model that its adapter's files do not restore."""
    if not knows_layers(model):
        raise ConfigurationError(
            "A saved adapter would not restore the model: peft does not know what a strategy made of its layers, "
            "such as experts; leave SaveAdapters out and keep whole weights by checkpoint.keep_ends=true."
        )
    lost = unsaved(model)
    if lost:
        raise ConfigurationError(
            f"A saved adapter would not restore the model: {lost[0]} changes in training, but peft does not save it; "
            "freeze it (BatchNorm: evaluation mode), add it to modules_to_save, or leave SaveAdapters out and keep "
            "whole weights by checkpoint.keep_ends=true."
        )


class SaveAdapters(Callback):
    """Writes the adapter after each experience, as files that ``peft.PeftModel.from_pretrained`` loads.

    Into ``experience_K/live`` and, for each view that a strategy offers (an average, say), ``experience_K/VIEW``;
    with a further folder for each peft model if the module holds several.

    Args:
        dir: Folder of the files; ``adapters`` in the trainer's log or root folder when ``None``.

    Raises:
        ConfigurationError: If the module holds no ``peft.PeftModel``, or such files could not restore the model: a
            strategy merges adapters into the weights below them, or more is trained than what peft saves.
    """

    def __init__(self, *, dir: str | Path | None = None) -> None:
        self._own_dir = None if dir is None else Path(dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream_data(trainer)
        need_whole_weights(trainer, "SaveAdapters")
        self._dir = result_folder(trainer, self._own_dir, "adapters")
        merging = [type(c).__name__ for c in callbacks_of(trainer) if isinstance(c, Strategy) and c.changes_frozen]
        if merging:
            raise ConfigurationError(
                f"{merging[0]} merges adapters into the weights below them, so that a saved adapter alone does not "
                "restore the model; leave SaveAdapters out, and keep whole weights by checkpoint.keep_ends=true."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _, model in adapter_models(pl_module):
            _check_saved(model)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if not trainer.is_global_zero:
            return
        folder = self._dir
        models = list(adapter_models(module))
        final = folder / f"experience_{experience.index}"
        unfinished = unfinished_name(final)
        # of a run that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, view in views_of(trainer).items():
            with view(module):
                for path, model in models:
                    model.save_pretrained(str(unfinished / name if len(models) == 1 else unfinished / name / path))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
