"""Components against the modules that hold them: PEFT's forward adds the update that analysis reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_configs import CONFIGS
from peft import LilyConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods_table import METHODS
from plain_models import WIDTH
from tolerance import assert_sums_agree
from ziggurat import AdapterDropConfig, LoR2CConfig, MSPLoraConfig
from ziggurat.analysis import Collected, Component, collect
from ziggurat.errors import ConfigError
from ziggurat.export import lora_pairs
from ziggurat.lowrank.pair import delta
from zoo import ZOO

Adapted = Callable[[Any], PeftModel]
Saved = Callable[[Any], Path]


def composed(collected: Collected) -> dict[tuple[int, str], Tensor]:
    """(layer, role) -> dense update of the linear."""
    part = "update" if "update" in collected.parts else collected.parts[0]
    return {(c.layers[0], c.role): delta(c.pair) for c in collected.of(part)}


@pytest.mark.parametrize("method", ["msplora", "lora2", "dylora", "sharelora", "tiedlora", "loraxs", "aslora"])
def test_the_update_of_a_linear_is_what_its_module_adds(method: str, adapted: Adapted) -> None:
    model = adapted(CONFIGS[method]())
    actual = composed(collect(model))
    pairs = lora_pairs(model)
    assert len(actual) == len(pairs) == 8
    for (layer, role), update in actual.items():
        pair = pairs[f"bert.encoder.layer.{layer}.{role}"]
        assert_sums_agree(update, delta(pair), WIDTH)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora"])
def test_the_update_of_a_foreign_linear_is_its_delta(method: str, adapted: Adapted) -> None:
    model = adapted(CONFIGS[method]())
    actual = composed(collect(model))
    assert len(actual) == 8
    for (layer, role), update in actual.items():
        module = model.get_base_model().get_submodule(f"bert.encoder.layer.{layer}.{role}")
        assert_sums_agree(update, module.get_delta_weight("default").detach(), WIDTH)


def test_the_tiers_add_up_to_the_update(adapted: Adapted) -> None:
    collected = collect(adapted(CONFIGS["msplora"]()))
    assert collected.parts == ["global", "mid", "layer", "update"]
    for whole in collected.of("update"):
        parts = [
            c
            for part in collected.stored_parts
            for c in collected.of(part)
            if c.role == whole.role and whole.layers[0] in c.layers
        ]
        assert [c.rank for c in parts] == [4, 2, 1]
        assert_sums_agree(sum(delta(c.pair) for c in parts), delta(whole.pair), WIDTH)
    assert [c.layers for c in collected.of("mid")][:3] == [(0, 1), (2,), (3,)]


def test_paths_are_read_over_their_spans(adapted: Adapted) -> None:
    config = LoR2CConfig(r=4, spans=[[0, 1], [3, 3]], injected_layers=[2], init_weights=False)
    collected = collect(adapted(config))
    assert collected.parts == ["path", "injected"]
    assert [c.layers for c in collected.of("path")] == [(0, 1), (3,)]
    assert {(c.layers, c.role) for c in collected.of("injected")} == {
        ((2,), "attention.self.query"),
        ((2,), "attention.self.value"),
    }
    assert collected.by_layer == "path"


def test_a_shared_path_has_the_shared_factor(adapted: Adapted) -> None:
    collected = collect(adapted(LoR2CConfig(r=4, share=True, init_weights=False)))
    first, *others = collected.of("path")
    assert len(others) == 3
    for other in others:
        (shared,) = first.tensors.keys() & other.tensors.keys()
        assert first.tensors[shared] == first.A.numel()
        torch.testing.assert_close(other.A, first.A, rtol=0, atol=0)
        assert not torch.equal(other.B, first.B)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_folder_says_what_the_model_said(method: str, adapted: Adapted, tmp_path: Path) -> None:
    model = adapted(CONFIGS[method]())
    model.save_pretrained(str(tmp_path / "saved"))
    live, stored = collect(model), collect(tmp_path / "saved")
    assert stored.source == "saved"
    assert {c.name for c in stored.components} == {c.name for c in live.components}
    by_name = {c.name: c for c in stored.components}
    for component in live.components:
        np.testing.assert_array_equal(by_name[component.name].singular_values, component.singular_values)


def test_half_precision_is_read(adapted: Adapted) -> None:
    model = adapted(CONFIGS["msplora"]())
    exact = collect(model).components[0].singular_values
    rough = collect(model.to(torch.bfloat16)).components[0].singular_values
    np.testing.assert_allclose(rough, exact, rtol=2e-2)


def test_two_stacks_are_told_apart() -> None:
    config = METHODS["msplora"].config(ZOO["t5"], init_weights=False)
    collected = collect(get_peft_model(ZOO["t5"].build(), config))
    assert collected.layers == ZOO["t5"].stacks
    assert collected.components[0].stack == "encoder.block"


def test_a_pyramid_without_private_tier_is_read_from_a_model(adapted: Adapted, saved: Saved) -> None:
    tiers = [{"name": "whole", "groups": 1}, {"name": "half", "groups": 2}]
    config = MSPLoraConfig(r=2, tiers=tiers, target_modules=["query"], init_weights=False)
    collected = collect(adapted(config))
    assert [c.layers for c in collected.components if c.stored] == [(0, 1, 2, 3), (0, 1), (2, 3)]
    assert collected.by_layer == "update"
    stored = collect(saved(config))
    assert [c.layers for c in stored.components] == [c.layers for c in collected.components]


def test_zeros_are_noted(adapted: Adapted) -> None:
    collected = collect(adapted(LoraConfig(r=4, target_modules=["query"])))
    assert collected.notes == (
        "4 of 4 components are exactly zero (lora layer 0 of bert.encoder.layer: attention.self.query, ...): "
        "B was never trained",
    )
    assert all(c.zero for c in collected.components)


def test_nan_is_noted_and_stays_where_it_is(adapted: Adapted) -> None:
    model = adapted(CONFIGS["lora"]())
    module = model.get_base_model().get_submodule("bert.encoder.layer.2.attention.self.query")
    with torch.no_grad():
        module.lora_B["default"].weight[0, 0] = float("nan")
    collected = collect(model)
    assert collected.notes[0].startswith("1 of 8 components have NaN or infinite entries (lora layer 2 of")
    broken = [c for c in collected.components if not np.isfinite(c.singular_values).all()]
    assert [c.name for c in broken] == ["lora layer 2 of bert.encoder.layer: attention.self.query"]
    assert not broken[0].zero


def test_one_layer_is_noted(adapted: Adapted) -> None:
    config = LoraConfig(
        r=2, target_modules=["query", "value"], layers_to_transform=[1], layers_pattern="layer", init_lora_weights=False
    )
    assert collect(adapted(config)).notes == ("the adapter reaches layer 1 only, so there are no layers to compare",)


def test_bad_folders_are_refused(tmp_path: Path, saved: Saved) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        collect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is no adapter: it has no adapter_config\.json"):
        collect(tmp_path / "empty")
    folder = saved(CONFIGS["lora"]())
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        collect(folder)
    weights.write_bytes(whole)
    tensors = {name.replace("lora_", "other_"): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match="no factor pair of LORA: its 16 tensors"):
        collect(folder)
    folder = saved(CONFIGS["msplora"]())
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    gone = next(name for name in tensors if name.endswith("B_mid"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, weights)
    with pytest.raises(ConfigError, match=r"the adapter's file lacks .*B_mid, which its config asks for at '.*'"):
        collect(folder)


def test_a_start_from_the_weights_is_noted(adapted: Adapted) -> None:
    assert collect(adapted(CONFIGS["pissa"]())).notes[0].startswith("the pairs began as a part of W (pissa)")


@pytest.mark.filterwarnings("ignore:Adapter .default.*invalid shape")
def test_a_pruned_adalora_is_read_with_the_ranks_that_are_left(adapted: Adapted, tmp_path: Path) -> None:
    model = adapted(CONFIGS["adalora"]())
    for n, (_, E) in enumerate(p for p in model.named_parameters() if "lora_E" in p[0]):
        E.data[n % 5 :] = 0
    keep = {n.replace("lora_E.default", "lora_E"): (E.flatten() != 0).tolist()
            for n, E in model.named_parameters() if "lora_E" in n}  # fmt: skip
    model.peft_config["default"].rank_pattern = {n.replace("base_model.model.", ""): v for n, v in keep.items()}
    live = collect(model)
    model.save_pretrained(str(tmp_path / "pruned"))
    stored = {c.name: c for c in collect(tmp_path / "pruned").components}
    assert {c.rank for c in stored.values()} > {1, 2}
    for component in live.components:
        assert_sums_agree(delta(stored[component.name].pair), delta(component.pair), WIDTH)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (VeraConfig(r=4, target_modules=["query"]), "VERA"),
        (LilyConfig(r=4, target_modules=["query"]), "LILY"),
        (AdapterDropConfig(r=4), "ADAPTERDROP"),
    ],
)
def test_other_methods_are_refused_with_what_is_readable(config: Any, name: str, adapted: Adapted) -> None:
    with pytest.raises(ConfigError, match=f"PEFT method {name}; analysis reads .*MSPLoRA"):
        collect(adapted(config))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no adapter 'default'; its adapters: none"):
        collect(ZOO["bert"].build())


def test_names_are_unique(adapted: Adapted) -> None:
    for method, config in CONFIGS.items():
        names = [c.name for c in collect(adapted(config())).components]
        assert len(names) == len(set(names)), method


def test_a_component_tells_its_size() -> None:
    component = Component("lora", "layers", "q", (0,), torch.zeros(3, 5), torch.zeros(7, 3))
    assert (component.rank, component.shape, component.parameters) == (3, (7, 5), 36)
    assert component.zero and component.name == "lora layer 0 of layers: q"


def test_what_waits_for_an_event_takes_no_part(adapted: Adapted) -> None:
    """An adapter stores pairs for injections that may come; until then the paths alone act."""
    collected = collect(adapted(LoR2CConfig(r=4, merges=1, injections=1, init_weights=False)))
    assert collected.parts == ["path"] and len(collected.components) == 4
