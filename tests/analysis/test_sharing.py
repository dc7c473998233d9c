"""Energy that matrices have in common: the definition on dense matrices, and the suggestion made from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from methods_table import zoo_config
from plain_models import LAYERS as LAYERS_OF_LISTS
from plain_models import WIDTH as WIDTH_OF_LISTS
from plain_models import PlainList, RoutedBlock
from tolerance import assert_sums_agree
from ziggurat import MSPLoraConfig
from ziggurat.analysis import collect, sharing
from ziggurat.cli import app
from ziggurat.lowrank.pair import FactorPair
from ziggurat.plan.suggest import by_gradients
from zoo import ZOO

LAYERS, WIDTH = 6, 32


def lora(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    get_peft_model(ZOO["bert"].build(), zoo_config("dylora", "bert", init_weights=False)).save_pretrained(folder)
    return folder


def test_shared_energy_is_that_of_the_definition(tmp_path: Path) -> None:
    adapters = [collect(lora(tmp_path / str(seed), seed)) for seed in (0, 1)]
    lines = {(line.over, line.where): line for line in sharing.shared(sharing.updates(adapters))}
    dense = {(n, c.role, c.layers[0]): (c.B @ c.A).double() for n, a in enumerate(adapters) for c in a.of("dylora")}

    def common(families: list[list[Tensor]]) -> tuple[float, float]:
        energy = sum(float(D.square().sum()) for family in families for D in family)
        mean = sum(len(f) * float(torch.stack(f).mean(0).square().sum()) for f in families)
        return mean / energy, sum(float(D.square().sum()) / len(f) for f in families for D in f) / energy

    roles = list(dict.fromkeys(role for _, role, _ in dense))
    for role in roles:
        depth = [[dense[n, role, layer] for layer in range(4)] for n in (0, 1)]
        thirds = [[dense[n, role, layer] for layer in third] for n in (0, 1) for third in ((0, 1), (2,), (3,))]
        across = [[dense[n, role, layer] for n in (0, 1)] for layer in range(4)]
        for over, families in (("depth", depth), ("group", thirds), ("adapter", across)):
            line = lines[over, role]
            assert (line.share, line.independent) == pytest.approx(common(families), rel=1e-6)
    line = lines["role", ""]
    assert line.number == 2
    assert line.share == pytest.approx(common([[dense[n, r, k] for r in roles] for n in (0, 1) for k in range(4)])[0])


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_an_expert_of_pefts_lora_is_compared_over_depth_with_itself(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"r": 2} if kind == "lora" else {"init_r": 2, "target_r": 2, "total_step": 9}
    config = (LoraConfig if kind == "lora" else AdaLoraConfig)(
        target_modules=["query"], init_lora_weights=False, **fields
    )
    model = get_peft_model(PlainList([RoutedBlock() for _ in range(LAYERS_OF_LISTS)]), config)
    model.save_pretrained(str(tmp_path))
    items = sharing.updates([collect(tmp_path)])
    lines = {(line.over, line.where): line for line in sharing.shared(items)}
    assert {item.family for item in items} == {"query", "experts.query"}
    assert lines["depth", "experts.query"].number == LAYERS_OF_LISTS
    assert lines["expert", "experts.query"].number == 3
    at = {(c.layers[0], e): (c.B @ c.A).double() for c in collect(tmp_path).components for e in c.experts or ()}
    families = [torch.stack([at[layer, e] for layer in range(LAYERS_OF_LISTS)]) for e in range(3)]
    share = sum(len(f) * float(f.mean(0).square().sum()) for f in families)
    expected = share / sum(float(f.square().sum()) for f in families)
    assert lines["depth", "experts.query"].share == pytest.approx(expected, rel=1e-5)
    root = model.get_base_model()
    x = torch.randn(2, WIDTH_OF_LISTS)
    compared = sharing.gradients(root, (root(x).square().mean() for _ in range(1)))
    assert {(i.role, i.family, i.layer, i.expert) for i in compared} == {
        (i.role, i.family, i.layer, i.expert) for i in items
    }


class Products(TorchFunctionMode):
    """Counts the matrix products of its block."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += getattr(func, "__name__", "") in ("matmul", "__matmul__", "mm", "einsum")
        return func(*args, **(kwargs or {}))


def test_a_gram_matrix_of_hundreds_of_experts_takes_one_product_each() -> None:
    torch.manual_seed(0)
    pairs = [FactorPair(torch.randn(n % 3 + 1, 8), torch.randn(8, n % 3 + 1)) for n in range(512)]
    dense = [sharing.Item("", "layers", "experts.q", 0, 1, B @ A, n) for n, (A, B) in enumerate(pairs)]
    thin = [sharing.Item("", "layers", "experts.q", 0, 1, pair, n) for n, pair in enumerate(pairs)]
    flat = torch.stack([item.matrix for item in dense]).double().flatten(1)  # type: ignore[arg-type]
    for items in (dense, thin):
        with Products() as products:
            made = sharing.gram(items)
        assert_sums_agree(torch.from_numpy(made), flat @ flat.T, length=64, depth=2, dtype=torch.float32)
        assert products.number <= 2 * len(items)  # pairs of experts, one by one, take some 260,000


def test_equal_updates_have_all_in_common_and_independent_ones_as_much_as_said() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 64, generator=generator)
    same = [sharing.Item("", "layers", "q", n, 8, matrix) for n in range(8)]
    other = [sharing.Item("", "layers", "q", n, 8, torch.randn(64, 64, generator=generator)) for n in range(8)]
    depth = {name: sharing.shared(items)[0] for name, items in (("same", same), ("other", other))}
    assert depth["same"].share == pytest.approx(1.0)
    assert depth["other"].share == pytest.approx(depth["other"].independent, rel=0.15)
    assert depth["other"].independent == pytest.approx(1 / 8)


class Stack(nn.Module):
    """A sum of linear layers on inputs of their own, so that the best update of each is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH, bias=False)}) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer["linear"](part) for layer, part in zip(self.layers, x, strict=True)])  # type: ignore[index]


def task(alike: bool) -> tuple[Stack, Tensor, Tensor]:
    """A model, inputs and outputs: to be learned is one update of rank 6, or one of rank 2 for each layer."""
    torch.manual_seed(0)
    model = Stack()
    rank = 6 if alike else 2
    wanted = [torch.randn(WIDTH, rank) @ torch.randn(rank, WIDTH) / 8 for _ in range(1 if alike else LAYERS)]
    x = torch.randn(LAYERS, 256, WIDTH)
    with torch.no_grad():
        y = model(x) + torch.stack([x[n] @ wanted[n % len(wanted)].T for n in range(LAYERS)])
    return model, x, y


def learned(model: Stack, x: Tensor, y: Tensor, ranks: list[int]) -> float:
    """The loss after training a pyramid of these ranks."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, MSPLoraConfig(ranks=ranks, target_modules=["linear"], even_scales=True))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-2)
    for _ in range(150):
        loss = (adapted(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.unload()
    return float(loss)


def test_what_the_gradients_suggest_learns_more_than_what_they_advise_against() -> None:
    """One budget, two tasks: each pyramid is suggested for one of them, and beats the other one there."""
    suggested, tasks = {}, {alike: task(alike) for alike in (True, False)}
    for alike, (model, x, y) in tasks.items():
        adapted = get_peft_model(model, MSPLoraConfig(r=4, target_modules=["linear"]))
        root = adapted.get_base_model()
        items = sharing.gradients(root, ((root(x) - y).square().mean() for _ in range(1)))
        budget = (
            16 * 2 * WIDTH
        )  # sixteen pairs of rank 1; one rank for each tier takes ten, one more for all layers six
        advice = by_gradients(items, budget)
        assert advice.spent <= budget
        suggested[alike] = list(advice.ranks.values())
        assert any("hardly more in common" in note for note in advice.notes) is not alike
        adapted.unload()
    assert suggested == {True: [7, 1, 1], False: [1, 1, 2]}
    for alike, (model, x, y) in tasks.items():
        assert learned(model, x, y, suggested[alike]) < 0.7 * learned(model, x, y, suggested[not alike])


def test_analyze_says_what_updates_and_gradients_have_in_common(tmp_path: Path) -> None:
    first, two = lora(tmp_path / "one", 0), lora(tmp_path / "two", 1)
    done = CliRunner().invoke(app, ["analyze", str(first), "--beside", str(two)])
    assert done.exit_code == 0, done.output
    assert "2 adapters at each linear layer of" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["analyze", str(first), "--beside", str(two), "--json"])
    lines = json.loads(done.output)["sharing"]
    assert {line["over"] for line in lines} == {"depth", "group", "role", "adapter"}
    assert all(np.isfinite(line["share"]) and 0 < line["independent"] < 1 for line in lines)
