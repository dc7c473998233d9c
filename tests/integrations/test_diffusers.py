"""diffusers' own calls on a UNet: an adapter is added, saved with its config in one file, and loaded again."""

from pathlib import Path

import pytest
import torch

from ziggurat import DyLoRAConfig, LoRA2Config, MSPLoraConfig
from ziggurat.errors import ConfigError

diffusers = pytest.importorskip("diffusers")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> "diffusers.UNet2DConditionModel":
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=6, attention_head_dim=4,
    ).eval()  # fmt: skip


@torch.no_grad()
def noise(model: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return model(torch.randn(2, 1, 8, 8, generator=draw), 3, torch.randn(2, 5, 6, generator=draw)).sample


@pytest.mark.parametrize("config", [MSPLoraConfig, LoRA2Config, DyLoRAConfig])
def test_a_saved_file_loads_again(config: type, tmp_path: Path) -> None:
    model = unet()
    model.add_adapter(config(r=4, target_modules=ATTENTION, init_weights=False))
    expected = noise(model)
    model.save_lora_adapter(tmp_path)
    (file,) = tmp_path.iterdir()
    loaded = unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name=file.name)
    assert torch.equal(noise(loaded), expected)
    assert not torch.allclose(noise(unet()), expected, atol=1e-3)
    assert isinstance(loaded.peft_config[loaded.active_adapters()[0]], config)


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = unet()
    model.add_adapter(MSPLoraConfig(r=4, target_modules=ATTENTION))
    model.save_lora_adapter(tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as content:
        tensors, about = {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118
    del tensors[min(tensors)]
    save_file(tensors, file, about)
    with pytest.raises(ConfigError, match=r"lacks|missing"):
        unet().load_lora_adapter(tmp_path, prefix=None, weight_name=file.name)
