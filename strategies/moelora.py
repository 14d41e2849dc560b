"""MoELoRA: the adapter of a layer as experts, mixed by a router for each token."""

from __future__ import annotations

from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn

from clkit.errors import ConfigurationError, check_whole
from clkit.method.adapters import LowRank, lora_layers
from clkit.method.strategy import Strategy
from clkit.rng import private_rng


class MoELoRA(Strategy):
    r"""Split each LoRA into experts, and let a router weigh them for each token; CoIN's own method.

    A layer's output is, for an input :math:`x` of one token (or one sample, where there are no tokens),

    .. math:: h = W x + s \sum_{e=1}^{E} \operatorname{softmax}(G x)_e \, B_e A_e x

    The experts are the rows of :math:`A` and the columns of :math:`B` of the module's plain LoRA adapter, which has
    rank :math:`r` in all: :math:`A_e` is :math:`r/E \times n`. The router :math:`G`, :math:`E \times n` without bias,
    is new and trained with them; dropout is before :math:`A_e` alone. All experts are active. There is no balance loss
    and no task label, and the next experience trains the same weights on: what keeps old tasks is that tokens which
    look different go to different experts.

    The layers stay as they are after the fit: the routers belong to the module's weights. The update is no product
    :math:`BA` of two matrices, since its factor depends on the token. So it can be neither merged nor penalised by its
    entries, and strategies that do so (RegLoRA, OLoRA) refuse it.

    Args:
        experts: :math:`E`, at least 1; published: 8, with :math:`r = 128`. One expert is plain LoRA.
        seed: Seed of the new routers, which start as those of ``torch.nn.Linear`` do.

    Raises:
        ConfigurationError: If ``experts`` does not divide the rank, or the module has no plain LoRA adapter of linear
            layers.

    Reference: Chen et al., *CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large Language Models*,
    arXiv 2403.08350, section 4.
    """

    def __init__(self, experts: int = 8, *, seed: int = 0) -> None:
        check_whole("experts", experts, 1)
        self.experts, self.seed = experts, seed
        self._is_new = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # before the optimizer is made, and before a checkpoint's weights are loaded
        there = mixtures(pl_module)
        self._is_new = not there
        for name, mixture in there or self.split(pl_module):
            if mixture.experts != self.experts:
                raise ConfigurationError(
                    f"{name} has {mixture.experts} experts already, of an earlier fit; use experts={mixture.experts}, "
                    "or a new module."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_new and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ConfigurationError(
                "The trainer forks processes and gives their weights back to a module that has no routers; use the "
                "trainer's strategy='ddp', or call MoELoRA(...).split(module) before the fit."
            )

    def split(self, module: nn.Module) -> list[tuple[str, Mixture]]:
        """Make experts of a module's adapter, as a fit does at its start; return the layers, as :func:`mixtures`.

        Raises:
            ConfigurationError: If that is not possible.
        """
        for position, entry in enumerate(lora_layers(module)):
            self._split(entry, position)
        return mixtures(module)

    def _split(self, entry: LowRank, position: int) -> None:
        layer: Any = entry.layer
        a = entry.weights[1]
        rank = layer.r[entry.adapter]
        if entry.adapter in layer.lora_embedding_A or not isinstance(layer.get_base_layer(), nn.Linear):
            raise ConfigurationError(
                f"MoELoRA routes what goes into linear layers, but {entry.name} is "
                f"{type(layer.get_base_layer()).__name__}; choose other target_modules."
            )
        if rank % self.experts:
            raise ConfigurationError(
                f"experts={self.experts} does not divide the rank {rank} of {entry.name}; use a multiple of it as "
                "rank (model.adapter.rank), or another number of experts."
            )
        router = nn.Linear(a.shape[1], self.experts, bias=False, device="meta", dtype=a.dtype).to_empty(device=a.device)
        seeds = private_rng(self.seed, 51, position)
        start = torch.from_numpy(seeds.uniform(-1, 1, (self.experts, a.shape[1]))) / a.shape[1] ** 0.5
        with torch.no_grad():
            router.weight.copy_(start)
        layer.lora_router = nn.ModuleDict({entry.adapter: router})
        # peft then saves, freezes and activates it with the adapter
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_router")
        layer.lora_variant[entry.adapter] = Mixture(self.experts)


class Mixture:
    """What peft's layers call in place of their own update: a ``LoraVariant``.

    Args:
        experts: Number of experts.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """Return the layer's output.

        Args:
            module: peft's layer.
            active_adapter: Name of its adapter.
            x: The layer's input, ``[..., n]``.
            result: What the layer makes of it without an adapter, ``[..., m]``.
            **options: None.
        """
        gates = module.lora_router[active_adapter](x).softmax(dim=-1)
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        weighed = inner.unflatten(-1, (self.experts, -1)) * gates.unsqueeze(-1)
        update: Tensor = module.lora_B[active_adapter](weighed.flatten(-2)) * module.scaling[active_adapter]
        return result + update

    def supports_lora_conversion(self) -> bool:
        """Tell that it cannot be made a plain LoRA."""
        return False

    def merge_safe(self, *args: Any) -> Tensor:
        """Refuse: the update depends on the input.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("A mixture of experts has a different update for each token and cannot be merged.")

    merge_unsafe = unmerge = merge_safe


def mixtures(module: nn.Module) -> list[tuple[str, Mixture]]:
    """Return the layers with experts by their paths."""
    return [
        (name, mixture)
        for name, layer in module.named_modules()
        for mixture in cast(dict[str, Any], getattr(layer, "lora_variant", {})).values()
        if isinstance(mixture, Mixture)
    ]
