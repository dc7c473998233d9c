"""Bases whose weights accelerate keeps on disk or elsewhere between forwards: as beside a whole base, to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch import nn

from methods_table import logits
from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.host.base.offload import runs_on
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = ZOO["llama"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "msplora": lambda: MSPLoraConfig(r=4, target_modules=LLAMA.targets, init_weights=False),
    "lora2": lambda: LoRA2Config(r=4, target_modules=LLAMA.targets, init_weights=False),
    "lor2c": lambda: LoR2CConfig(r=4, injected_layers=[3], init_weights=False),
    "shared span over the border": lambda: LoR2CConfig(r=4, share=True, spans=[[0, 1], [2, 3]], init_weights=False),
}


def by_device_map(model: nn.Module, folder: Path) -> nn.Module:
    """As `device_map` does: two of four layers on disk, the rest in memory."""
    (layers,) = LLAMA.stacks
    where: dict[str, Any] = {name: "cpu" for name, _ in model.named_children()}
    root = layers.rpartition(".")[0]
    del where[root]
    where |= {f"{root}.{name}": "cpu" for name, _ in model.get_submodule(root).named_children() if name != "layers"}
    where |= {f"{layers}.{number}": "disk" if number in (1, 2) else "cpu" for number in range(4)}
    return dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def by_offload(model: nn.Module, folder: Path) -> nn.Module:
    """Every weight is taken from a state dict for the length of its module's forward."""
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def by_auto(model: Any, folder: Path) -> nn.Module:
    """`device_map="auto"`, with memory for a part of the weights: the rest goes to the disk."""
    model.save_pretrained(folder / "saved")
    room = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) * 6 // 10
    where: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": folder / "offloaded"}
    return type(model).from_pretrained(folder / "saved", **where).eval()


WAYS = {"device_map": by_device_map, "auto": by_auto, "cpu_offload": by_offload}


def adapted(base: nn.Module, method: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, CONFIGS[method]())  # type: ignore[arg-type]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_computes_and_learns_as_beside_a_whole_base(
    way: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A frozen layer with hooks computes by itself; one without them would add up its dL/dx in another order.
    monkeypatch.setattr("ziggurat.lowrank.whole._ON", False)
    inputs = LLAMA.inputs()
    whole = adapted(LLAMA.build(), method)
    base = WAYS[way](LLAMA.build(), tmp_path / "weights")
    assert any(parameter.is_meta for parameter in base.parameters())
    model = adapted(base, method)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(parameter.is_meta for parameter in trained.values())
    assert torch.equal(logits(model.eval(), inputs), logits(whole.eval(), inputs))

    for each in (model, whole):
        each.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in trained.items():
        reference = wanted[name].grad
        if reference is None:  # a linear that waits for its layer's path to be given up
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, reference)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("way", ["device_map", "cpu_offload"])  # PEFT lays an `auto` base out anew
def test_an_adapter_loads_into_an_offloaded_base(way: str, method: str, tmp_path: Path) -> None:
    inputs = LLAMA.inputs()
    whole = adapted(LLAMA.build(), method).eval()
    whole.save_pretrained(tmp_path / "adapter")
    base = WAYS[way](LLAMA.build(), tmp_path / "weights")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded, inputs), logits(whole, inputs))


def test_weights_that_stay_in_place_are_not_said_to_move(tmp_path: Path) -> None:
    model = by_device_map(LLAMA.build(), tmp_path)
    (layers,) = LLAMA.stacks
    assert runs_on(model.get_submodule(f"{layers}.0")) is None
    assert runs_on(model.get_submodule(f"{layers}.1")) == torch.device("cpu")
    assert runs_on(LLAMA.build()) is None
