"""The rank pattern as a table and as a picture."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from ziggurat import LoRA2Config
from ziggurat.methods.lora2.pruning import adapted
from ziggurat.methods.lora2.ranks import grids, heat_map, table
from zoo import ZOO


def test_ranks_by_layer_and_role(tmp_path: Path) -> None:
    config = LoRA2Config(r=4, target_modules=["query", "value", "pooler.dense"], init_weights=False)
    model = get_peft_model(ZOO["bert"].build(), config)
    with torch.no_grad():
        for i, layer in enumerate(adapted(model, "default").values()):
            layer.factor("default", "E")[: i % 5] = 0
    expected = {
        "bert.encoder.layer": {
            "attention.self.query": {0: 4, 1: 2, 2: 0, 3: 3},
            "attention.self.value": {0: 3, 1: 1, 2: 4, 3: 2},
        },
        "": {"bert.pooler.dense": {0: 1}},
    }
    assert grids(model, model.ranks()) == expected
    lines = table(model, model.ranks()).splitlines()
    assert lines[0] == "| bert.encoder.layer | attention.self.query | attention.self.value | sum |"
    assert lines[4] == "| 2 | 0 | 4 | 4 |"
    assert lines[6] == "| sum | 9 | 10 | 19 |"
    assert lines[-1] == "| sum | 1 | 1 |"
    pytest.importorskip("matplotlib")
    figure = heat_map(model, model.ranks(), tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    shown = [axis for axis in figure.axes if axis.get_images()]
    assert [[text.get_text() for text in axis.texts] for axis in shown] == [
        ["4", "2", "0", "3", "3", "1", "4", "2"],
        ["1"],
    ]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == list(expected["bert.encoder.layer"])
