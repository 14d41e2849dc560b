"""A vision tower of timm, for models of texts and images of transformers whose projector takes tokens."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class TimmTowerConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Describes a :class:`TimmTower`.

    Args:
        architecture: Name of a network of timm.
        image_size: Side of its images, in pixels.
        hidden_size: Channels of its last feature map.
        **options: As in transformers.
    """

    model_type = "timm_tower"

    def __init__(
        self,
        architecture: str = "tf_efficientnet_lite0",
        image_size: int = 128,
        hidden_size: int = 320,
        **options: Any,
    ) -> None:
        self.architecture, self.image_size, self.hidden_size = architecture, image_size, hidden_size
        super().__init__(**options)


class TimmTower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The features of a network of timm as tokens, row by row.

    Each is normalised to mean 0 and variance 1 over its channels, whatever the scale of the network: a projector begins
    from what it can use. LLaVA takes it with ``vision_feature_layer=-1`` and ``vision_feature_select_strategy="full"``.
    It is registered with transformers as ``timm_tower``, so that ``from_pretrained`` loads models that hold one
    wherever this module has been imported.

    Args:
        config: What it is made of. Weights are random until they are loaded.
    """

    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ["TimmTower"]  # noqa: RUF012

    def __init__(self, config: TimmTowerConfig) -> None:
        import timm

        super().__init__(config)
        self.network = timm.create_model(config.architecture, features_only=True, out_indices=(-1,))
        cast(Any, self).post_init()

    def _init_weights(self, module: Any) -> None:
        """Leave timm's own initialisation."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return features.

        Args:
            pixel_values: ``[B, 3, H, W]``.

        Returns:
            ``last_hidden_state``, ``[B, N, C]``, also the only one of ``hidden_states``.
        """
        maps = self.network(pixel_values.to(self.dtype))[-1]
        tokens = F.layer_norm(maps.flatten(2).transpose(1, 2), (maps.shape[1],))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register("timm_tower", TimmTowerConfig)
AutoModel.register(TimmTowerConfig, TimmTower)
