"""Pyramid plus path: an MSPLoRA and a LoR2C adapter at once in one model, trained together, saved, loaded."""

from pathlib import Path

import torch
from torch import nn

import versions
from methods_table import logits
from ziggurat import LoR2CConfig, MSPLoraConfig
from ziggurat.methods.lor2c.events import restructure
from zoo import ZOO

pytestmark = [versions.transformers_calls, versions.saves_whole]


def both(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    model.add_adapter(MSPLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "pyramid")
    model.add_adapter(LoR2CConfig(r=4, **fields), "path")
    model.set_adapter(["pyramid", "path"])
    return model


def test_they_train_together_and_load_again(tmp_path: Path) -> None:
    model, inputs = both(merges=1, injections=1), ZOO["llama"].inputs()
    bare = logits(ZOO["llama"].build(), inputs)
    assert torch.equal(logits(model.eval(), inputs), bare)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert "path" in {name.split(".")[-2] for name in trained}
    assert any("msplora_" in name for name in trained)
    assert any("lor2c_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-2)
    model.train()
    losses = []
    for step in range(12):
        restructure(model, step, 24, optimizer)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), inputs)
    for name in ("pyramid", "path"):
        model.set_adapter(name)
        model.save_pretrained(str(tmp_path / name))
    assert (tmp_path / "path" / "lor2c_events.json").is_file()
    loaded = ZOO["llama"].build()
    loaded.load_adapter(str(tmp_path / "pyramid"), "pyramid")
    loaded.load_adapter(str(tmp_path / "path"), "path")
    loaded.set_adapter(["pyramid", "path"])
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    alone = {}
    for name in ("pyramid", "path"):
        loaded.set_adapter(name)
        alone[name] = logits(loaded, inputs)
        assert not torch.equal(alone[name], bare)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, inputs), bare)
    assert not torch.equal(alone["pyramid"], alone["path"])


def test_what_is_added_is_the_sum_of_both() -> None:
    """In float64, against the pyramid merged into its weights with the path alone beside them."""
    model, inputs = both(init_weights=False), ZOO["llama"].inputs()
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if "msplora_" in name:
            nn.init.normal_(parameter, std=0.2)
    expected = logits(model, inputs)
    for module in model.modules():
        if type(module).__name__ == "MSPLoraLinear":
            module.base_layer.weight.data += module.get_delta_weight("pyramid")
    model.set_adapter("path")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-10, atol=1e-10)
