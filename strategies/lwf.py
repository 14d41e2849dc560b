"""Learning without forgetting."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice
from clkit.method.distillation import Distillation, ask
from clkit.method.forward import outputs, takes
from clkit.method.setup_checks import check_logits
from clkit.method.strategy import check_pairs


class LwF(Distillation):
    r"""Keep the answers of the last model on the current data.

    .. math:: \mathcal L = \mathcal L_{task} + \alpha\, KL\big(p_T(h_{\theta^*}(x)) \,\|\, p_T(h_\theta(x))\big)

    :math:`h_{\theta^*}` is the model at the end of the last experience, in evaluation mode; :math:`p_T` is the softmax
    at temperature :math:`T` over the logits of the classes seen before (picked first, then normalised). In a
    task-incremental stream the old tasks are distilled one by one, each over its own classes, and averaged. KL is the
    mean over samples.

    ``form="bce"`` takes the outputs for independent sigmoids and adds instead, as a mean over samples (PredKD),

    .. math:: -\alpha \sum_{c\ \text{old}} \sigma(z^*_c) \log \sigma(z_c)
        + (1 - \sigma(z^*_c)) \log(1 - \sigma(z_c)), \qquad z^* = h_{\theta^*}(x),\ z = h_\theta(x)

    over all old classes of the stream, without temperature; ``Classifier(loss="bce")`` goes with it.

    The module's ``forward(x)`` must return logits over all classes of the stream, shape ``[B, C]``; those of new
    classes may come later. A ``forward(x, task)`` that needs the task is asked for each old task.

    Args:
        alpha: Weight of the distillation, at least 0.
        temperature: :math:`T` of the softmax form, above 0.
        form: ``"softmax"`` or ``"bce"``.

    Raises:
        ConfigurationError: If a value is out of range, or the stream has no classes.

    Reference: Li and Hoiem, *Learning without Forgetting*, arXiv 1606.09282; binary form: Smith et al.,
    *A Closer Look at Rehearsal-Free Continual Learning*, arXiv 2203.17269.
    """

    def __init__(
        self, alpha: float = 1.0, *, temperature: float = 2.0, form: Literal["softmax", "bce"] = "softmax"
    ) -> None:
        super().__init__(alpha)
        if temperature <= 0:
            raise ConfigurationError(f"temperature={temperature} is not possible; use a number above 0.")
        check_choice("form", form, ("softmax", "bce"))
        self.temperature, self.form = temperature, form
        self._groups: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "LwF", "use another strategy")
        stream = stream_data(trainer).stream
        if any(not experience.classes for experience in stream):
            raise ConfigurationError(
                f"LwF distils class logits, but stream {stream.name!r} has no classes; use another."
            )

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        super().on_experience_start(trainer, module, experience)
        self._set_groups(trainer, module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logits(trainer, pl_module, "LwF", "use FeatureDistillation", all_classes=False)
        if self.form == "bce" and not takes(pl_module, None):
            raise ConfigurationError(
                f"LwF(form='bce') distils all old classes at once, but {type(pl_module).__name__}.forward needs a "
                "task; use form='softmax', or give it task=None."
            )
        super().on_train_start(trainer, pl_module)
        self._set_groups(trainer, pl_module)

    def _set_groups(self, trainer: Trainer, module: LightningModule) -> None:
        stream, k = stream_data(trainer).stream, stream_data(trainer).experience.index
        if stream.kind == "task-incremental" and self.form == "softmax":
            groups = [stream[i].classes for i in range(k)]
        else:
            groups = [stream.classes_seen(k - 1)] if k > 0 else []
        self._groups = [torch.tensor(group, device=module.device) for group in groups]

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.teacher is None or not self._groups or self.alpha == 0:
            return None
        distance = self._divergence if self.form == "softmax" else self._binary
        distances, asked = [], None
        for group, inputs in zip(self._groups, self._inputs(trainer, module, batch), strict=True):
            if inputs is not asked:
                old, new, asked = ask(module, self.teacher, *inputs), outputs(module, *inputs), inputs
            distances.append(distance(old[:, group], new[:, group]))
        return self.alpha * torch.stack(distances).mean()

    def _inputs(self, trainer: Trainer, module: LightningModule, batch: Any) -> list[tuple[Any, ...]]:
        """What the module is asked for each group."""
        inputs = (batch[0],)
        if takes(module, *inputs):
            return [inputs] * len(self._groups)
        tasks = [experience.task for experience in stream_data(trainer).stream]
        return [(batch[0], torch.full_like(batch[2], task or 0)) for task in tasks[: len(self._groups)]]

    def _divergence(self, old: Tensor, new: Tensor) -> Tensor:
        log_p, log_q = (torch.log_softmax(logits.float() / self.temperature, dim=1) for logits in (old, new))
        return kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def _binary(self, old: Tensor, new: Tensor) -> Tensor:
        targets = old.float().sigmoid()
        return binary_cross_entropy_with_logits(new.float(), targets, reduction="none").sum(dim=1).mean()
