"""A network of timm as the vision tower of a model of transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
import transformers
from torch import nn

from clkit.language.models import VisionLanguage
from clkit.language.towers import TimmTower, TimmTowerConfig
from clkit.testing import small_vision_language_module


def with_timm() -> VisionLanguage:
    config = small_vision_language_module(adapter=None).net.config
    config.vision_config = TimmTowerConfig(image_size=64)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    return VisionLanguage(transformers.LlavaConfig.from_dict(config.to_dict()))


@torch.no_grad()
def test_tokens_are_the_last_features_row_by_row_and_normalised():
    torch.manual_seed(0)
    tower = TimmTower(TimmTowerConfig()).eval()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    missing = whole.load_state_dict(tower.network.state_dict(), strict=False).missing_keys
    assert {key.split(".")[0] for key in missing} == {"conv_head", "bn2", "classifier"}
    images = torch.randn(2, 3, 96, 64)
    maps = whole.blocks(whole.bn1(whole.conv_stem(images)))
    out = tower(images)
    assert out.hidden_states[-1] is out.last_hidden_state
    assert out.last_hidden_state.shape == (2, 3 * 2, 320)
    for row, column in ((0, 0), (1, 0), (2, 1)):
        token = maps[1, :, row, column]
        expected = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(out.last_hidden_state[1, 2 * row + column], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_with_it_is_loaded_in_a_fresh_process_and_only_its_tower_is_frozen(tmp_path):
    torch.manual_seed(0)
    module = with_timm().train()
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in module.named_parameters() if "vision_tower" in name}
    module.net.save_pretrained(tmp_path)
    total = sum(float(parameter.detach().double().sum()) for parameter in module.parameters())
    code = (
        "from clkit.language.models import VisionLanguage; import sys; module = VisionLanguage(sys.argv[1]);"
        "print(sum(float(parameter.double().sum()) for parameter in module.parameters()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert abs(float(found) - total) < 1e-9 * abs(total) + 1e-9
