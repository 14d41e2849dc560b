"""Feature distillation."""

from __future__ import annotations

from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from clkit.data.datamodule import stream_data
from clkit.data.forward_record import LayerCall, record_layers, unwatch, watch
from clkit.errors import ConfigurationError, check_choice
from clkit.method.distillation import Distillation, ask
from clkit.method.forward import layer_call
from clkit.method.head import last_linear
from clkit.method.setup_checks import few_outputs
from clkit.method.strategy import check_pairs


class FeatureDistillation(Distillation):
    r"""Keep the features that the last model had for the current data.

    .. math:: \mathcal L = \mathcal L_{task}
        + \alpha\, \tfrac1F \|\phi_\theta(x) - \phi_{\theta^*}(x)\|_2^2

    :math:`\phi_{\theta^*}` is the model at the end of the last experience, in evaluation mode, and :math:`F` the
    number of features of a sample, so :math:`\alpha` means the same for any width; its mean over samples is added.
    The paper sums over the features (``reduction="sum"``): its :math:`\alpha` is ours divided by :math:`F`.

    Args:
        alpha: Weight of the distillation, at least 0.
        reduction: ``"mean"`` or ``"sum"`` over the features.
        layer: Name of the submodule whose output is :math:`\phi`, shape ``[B, ...]``; the input of the last linear
            layer when ``None``.

    Raises:
        ConfigurationError: If a value is out of range, the batches are no ``(x, y)``, or the layer does not exist or
            is not called.

    Reference: FeatKD of Smith et al., *A Closer Look at Rehearsal-Free Continual Learning*, arXiv 2203.17269.
    """

    def __init__(
        self, alpha: float = 10.0, *, reduction: Literal["mean", "sum"] = "mean", layer: str | None = None
    ) -> None:
        super().__init__(alpha)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction
        self.layer = layer
        self._layer: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "FeatureDistillation", "use another strategy")
        self._find_layer(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layer = self._find_layer(pl_module)
        watch(pl_module, self._layer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._layer is not None:
            unwatch(pl_module, self._layer)
            self._layer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _find_layer(self, module: LightningModule) -> nn.Module:
        layers: dict[str, nn.Module] = dict(module.named_modules())
        if self.layer is not None:
            if self.layer not in layers:
                raise ConfigurationError(
                    f"layer={self.layer!r} is no submodule of {type(module).__name__}; "
                    f"use one of {', '.join(filter(None, layers))}."
                )
            return layers[self.layer]
        layer = last_linear(module)
        if layer is None:
            raise ConfigurationError(
                f"{type(module).__name__} has no linear layer whose input could be the features; set layer=NAME."
            )
        return layer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        few_outputs(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        layer = self._find_layer(pl_module)
        # a head that has grown may have taken its place
        if self._layer is not None and layer is not self._layer:
            unwatch(pl_module, self._layer)
            watch(pl_module, layer)
            self._layer = layer

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.teacher is None or self._layer is None or self.alpha == 0:
            return None
        inputs = stream_data(trainer).stream.inputs_of(batch)
        with record_layers([self._layer]) as calls:
            ask(module, self.teacher, *inputs)
        new = self._features(layer_call(module, self._layer, *inputs))
        old = self._features(calls.get(self._layer))
        squares = (new - old).square()
        return self.alpha * (squares.mean() if self.reduction == "mean" else squares.sum(dim=1).mean())

    def _features(self, call: LayerCall | None) -> Tensor:
        if call is None:
            raise ConfigurationError(
                f"forward did not call {self.layer or 'the last linear layer'}, so it has no features; set layer=NAME."
            )
        features: Tensor = call.args[0] if self.layer is None else call.output
        return features.flatten(1).float()
