"""ASLoRA: its equation, its merges during training, and a structure that goes along with the weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import versions
import ziggurat
from methods_table import logits
from ziggurat import ASLoRAConfig
from ziggurat.analysis import collect
from ziggurat.errors import ConfigError
from ziggurat.export import export_model
from ziggurat.host.count import count
from ziggurat.host.linear import AdaptedLinear
from zoo import ZOO

pytestmark = versions.saves_whole
#: Bert of the zoo: 4 layers, width 16.
LAYERS, D, R, ALPHA = 4, 16, 4, 6


def adapted(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    values = {"r": R, "target_modules": ["query", "value"], "lora_alpha": ALPHA, "init_weights": False, "groups": 2}
    return get_peft_model(ZOO["bert"].build(), ASLoRAConfig(**{**values, **fields}))


def layers(model: nn.Module, role: str = "query") -> list[AdaptedLinear]:
    return [m for path, m in model.named_modules() if isinstance(m, AdaptedLinear) and path.endswith(role)]


def merge_all(model: nn.Module, optimizer: Any = None) -> None:
    ziggurat.step(model, 10, 10, optimizer)


def groups(model: nn.Module, role: str = "query") -> list[int]:
    """For each layer the first layer that has the same B."""
    Bs = [layer.stored("default")["B"] for layer in layers(model, role)]
    return [next(n for n, other in enumerate(Bs) if other is B) for B in Bs]


def test_the_equation_before_and_after_merging() -> None:
    model = adapted().double().eval()
    for merged in (False, True):
        if merged:
            merge_all(model)
        for layer in layers(model):
            t, x = layer.stored("default"), torch.randn(3, D, dtype=torch.float64)
            expected = layer.base_layer(x) + ALPHA / R * x @ t["A"].T @ t["B"].T
            torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    A = [layer.stored("default")["A"] for layer in layers(model)]
    assert all(item is A[0] for item in A)
    assert len(set(groups(model))) == len(set(groups(model, "value"))) == 2


def test_the_nearest_merge_one_after_the_other() -> None:
    model = adapted(groups=1, merge_from=0.0, merge_until=1.0)
    Bs = [layer.stored("default")["B"] for layer in layers(model)]
    with torch.no_grad():
        for B, value in zip(Bs, (0.0, 5.0, 1.0, 7.0), strict=True):
            B.fill_(value)
    seen = []
    for step in range(10):
        ziggurat.step(model, step, 9)
        seen.append(tuple(groups(model)))
    assert seen[2] == (0, 1, 2, 3) and seen[3] == (0, 1, 0, 3) and seen[6] == (0, 1, 0, 1) and seen[9] == (0,) * 4
    assert torch.allclose(Bs[0], torch.full_like(Bs[0], 3.25))  # the mean over the layers


def test_merged_layers_learn_as_one() -> None:
    model, inputs = adapted().train(), ZOO["bert"].inputs()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def learn() -> None:
        optimizer.zero_grad()
        model(**inputs)[0].square().sum().backward()
        optimizer.step()

    learn()
    merge_all(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    acting = {id(layer.stored("default")["B"]) for role in ("query", "value") for layer in layers(model, role)}
    gone = [p for p in parameters if names[id(p)].endswith(":B") and id(p) not in acting]
    assert len(gone) == 4 and not any(p in optimizer.state for p in gone)
    before = {id(p): p.detach().clone() for p in parameters}
    learn()
    assert all(torch.equal(p, before[id(p)]) == any(p is item for item in gone) for p in parameters)


def test_the_structure_goes_along(tmp_path: Path) -> None:
    model, inputs = adapted().eval(), ZOO["bert"].inputs()
    merge_all(model)
    expected, shared = logits(model, inputs), groups(model)
    assert torch.equal(logits(copy.deepcopy(model), inputs), expected)
    model.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(len(some) == 2 for some in config["structure"].values())
    for fields in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path / "adapter"), **fields).eval()
        assert torch.equal(logits(loaded, inputs), expected) and groups(loaded) == shared

    # As a Trainer that resumes: into an adapter that is there already.
    fresh = adapted().eval()
    fresh.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    assert torch.equal(logits(fresh.eval(), inputs), expected) and groups(fresh) == shared
    plain = adapted().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain, inputs), expected) and groups(plain) == shared

    # The folder alone says which B's act, and the export has them.
    components = [c for c in collect(tmp_path / "adapter").components if c.role.endswith("query")]
    assert sum(len(c.layers) for c in components) == LAYERS and len({id(c) for c in components}) <= LAYERS
    export_model(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(lora, inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_trainer_merges_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    ids = torch.randint(5, 100, (24, 7), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})

    def trainer(folder: str) -> Trainer:
        settings: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "report_to": [], "use_cpu": True, "seed": 3}
        model = adapted(groups=1, merge_from=0.0, merge_until=0.9, init_weights=True, task_type="SEQ_CLS")
        return Trainer(
            model, TrainingArguments(str(tmp_path / folder), learning_rate=1e-2, **settings), train_dataset=data
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    halfway = json.loads((tmp_path / "whole" / "checkpoint-3" / "adapter_config.json").read_text())["structure"]
    assert all(1 < len(some) < LAYERS for some in halfway.values())
    assert groups(whole.model) == groups(resumed.model) == [0] * LAYERS
    trained = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_numbers_of_parameters() -> None:
    from ziggurat.methods.aslora import METHOD

    model = adapted()
    stored = 2 * (R * D + LAYERS * D * R)
    assert count(ZOO["bert"].build(), ASLoRAConfig(r=R, target_modules=["query", "value"])) == stored
    assert METHOD.finish is not None and METHOD.finish(model) == {"active": stored}
    merge_all(model)
    assert METHOD.finish(model) == {"active": 2 * (R * D + 2 * D * R)}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"groups": 0}, "groups=0"),
        ({"merge_from": 0.6}, r"merge_from=0\.6, merge_until=0\.5"),
        ({"merge_until": True}, "merge_until=True"),
        ({"structure": {"x": [[0], [0]]}}, "a layer is in two groups"),
        ({"structure": {"x": [[]]}}, "a group of no layers"),
        ({"structure": [1]}, "structure="),
        ({"structure": {"x": [[0.5]]}}, "no layer's number"),
    ],
)
def test_what_the_config_refuses(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ASLoRAConfig(**fields)
