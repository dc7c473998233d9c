"""Refusals of LoR2C, before anything in the model is changed, and the remedy in each message."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import MobileBertConfig, MobileBertModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from methods_table import logits
from ziggurat import LoR2CConfig
from ziggurat.errors import ConfigError
from ziggurat.host.base.stream import stream_width
from ziggurat.host.paths.layer import path_of
from zoo import ZOO


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merges": -1}, r"merges=-1: a whole number of at least 0"),
        ({"injections": 1.5}, r"injections=1\.5: a whole number"),
        ({"max_span": 0}, r"max_span=0: a whole number of at least 1"),
        ({"max_span": 1, "merges": 1}, r"max_span=1 with merges=1: a merged path covers at least 2"),
        ({"criterion": "size"}, r"criterion='size': 'mean', 'energy', 'sfs' or 'effective_rank'"),
        ({"keep": "upper"}, r"keep='upper': 'lower' or 'richer'"),
        ({"criterion_k": 9}, r"criterion_k=9: a path of rank r=8 has 8 singular values"),
        ({"lora_alpha": 0}, r"lora_alpha=0: a finite number above 0"),
        ({"lora_alpha": "16"}, r"lora_alpha='16'"),
        ({"inject_alpha": -1}, r"inject_alpha=-1: a finite number above 0"),
        ({"inject_dropout": "0.1"}, r"inject_dropout='0\.1': a probability"),
        ({"injected_layers": 3}, r"injected_layers=3: layers' numbers, each once"),
        ({"injected_layers": [0, 0]}, r"injected_layers=\[0, 0\]"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform=\['0'\]: a layer's number"),
        ({"inject_dropout": 1.0}, r"inject_dropout=1\.0: a probability"),
        ({"r": 1, "injections": 1}, r"r=1: LoRA in place of a path has rank r / 2.*set inject_r=1, or r=2"),
        ({"r": 0}, r"r=0: the rank must be a whole number"),
    ],
)
def test_values_that_work_in_no_model(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoR2CConfig(**fields)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("bert", {"spans": [[0, 1], [1, 2]]}, r"spans\[1\]=\(1, 2\) comes after \(0, 1\).*bert\.encoder\.layer"),
        ("bert", {"spans": [[2, 4]]}, r"spans\[0\]=\(2, 4\): needs 0 <= first <= last <= 3"),
        ("bert", {"spans": [[3]]}, r"spans\[0\]"),
        ("bert", {"spans": [[0, 3]], "max_span": 2, "merges": 0}, r"covers 4 layers: at most 2"),
        ("bert", {"spans": {"encoder": [[0, 1]]}}, r"names the stack 'encoder'; there is 'bert\.encoder\.layer'"),
        ("t5", {"spans": [[0, 4]]}, r"encoder\.block'.*A list is for every stack; with 2 stacks give \{stack"),
        ("bert", {"injected_layers": [7]}, r"injected_layers: 7 is no layer"),
        ("bert", {"spans": [[0, 2]], "injected_layers": [1]}, r"covers layer 1, which injected_layers rules out"),
        ("bert", {"layers_to_transform": [9]}, r"layer 9 isn't in any stack; layers are 0 to 3"),
        ("bert", {"layers_to_transform": [0, 1], "spans": [[1, 2]]}, r"covers layer 2, which layers_to_transform"),
        ("bert", {"merges": 4}, r"merges=4, but 4 paths have at most 3 merges of neighbours"),
        ("bert", {"merges": 3, "max_span": 2}, r"at most 2 merges of neighbours of at most max_span=2"),
        ("bert", {"merges": 1, "layers_to_transform": [0, 2]}, r"merges=1, but 2 paths have at most 0 merges"),
        ("bert", {"injections": 5}, r"injections=5, but only 4 paths cover a single layer"),
        ("bert", {"injections": 3, "spans": [[0, 1], [2, 2], [3, 3]]}, r"only 2 paths cover a single layer"),
        ("bert", {"merges": 2, "injections": 2}, r"of 4 paths at most 3 can go"),
        ("bert", {"injections": 1, "target_modules": ["qeury"]}, r"no linear layer called qeury.*near: query"),
        ("plain_list", {"injections": 1}, r"for model type 'custom' their names aren't known.*target_modules"),
        (
            "bert",
            {"injections": 1, "inject_r": 17},
            r"rank 17, but 'bert.*query' has room for 16 at most",
        ),
        ("bert", {"r": 17}, r"r=17 is above the width.*passes 16 values"),
        ("no_stack", {}, r"has no stack of layers.*'head' \(3 members\)"),
        ("bert", {"exclude_modules": r".*layer.*"}, r"no layer is left for a path"),
    ],
)
def test_what_a_model_cannot_have(model: str, fields: dict[str, Any], message: str) -> None:
    base = ZOO[model].build()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, LoR2CConfig(**{"r": 4, **fields}))
    assert [name for name, _ in base.named_modules()] == names


def test_layers_are_chosen_as_in_peft() -> None:
    def around(model: str = "bert", **fields: Any) -> list[int]:
        adapted = get_peft_model(ZOO[model].build(), LoR2CConfig(r=4, **fields))
        paths = [path_of(m) for m in adapted.modules()]
        return [path.layer for path in paths if path is not None]

    assert around() == [0, 1, 2, 3]
    assert around(layers_to_transform=2) == [2]
    assert around(layers_to_transform=[0, 3]) == [0, 3]
    assert around(exclude_modules=["layer.1"]) == [0, 2, 3]
    assert around("t5", layers_pattern="decoder.block") == [0, 1, 2, 3, 4]
    assert around("t5") == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert around(spans=[(1, 2)]) == [1, 2]
    assert around(injected_layers=[1]) == [0, 2, 3]


def test_injected_layers_have_lora_of_half_the_rank_from_the_start() -> None:
    config = LoR2CConfig(r=4, lora_alpha=8, injected_layers=[1], inject_alpha=6, lora_dropout=0.3, inject_dropout=0.1)
    assert (config.lora_r, config.lora_scale, config.scale) == (2, 3.0, 2.0)
    adapted = get_peft_model(ZOO["bert"].build(), config)
    assert adapted.path_counts()["active"] == 3 * 2 * 16 * 4 + 2 * 2 * 16 * 2
    query = adapted.get_base_model().bert.encoder.layer[1].attention.self.query
    assert (query.dropout("default"), list(query.adapters)) == (0.1, ["default"])
    assert isinstance(adapted.get_base_model().bert.encoder.layer[0].attention.self.query, nn.Linear)


@pytest.mark.parametrize("model", [name for name, zoo in ZOO.items() if zoo.stacks and name not in ("swin", "clip")])
def test_the_width_of_the_stream_is_seen_in_every_architecture(model: str) -> None:
    base = ZOO[model].build()
    for stack in ZOO[model].stacks:
        layers = [m for m in base.get_submodule(stack).children() if any(True for _ in m.children())]
        assert {stream_width(layer) for layer in layers} == {16}


def test_more_norms_in_a_bottleneck_are_not_the_stream() -> None:
    sizes = {"hidden_size": 64, "embedding_size": 16, "intermediate_size": 64, "intra_bottleneck_size": 32}
    torch.manual_seed(0)
    base = MobileBertModel(MobileBertConfig(vocab_size=100, num_hidden_layers=2, num_attention_heads=2, **sizes))
    adapted = get_peft_model(base, LoR2CConfig(r=4, init_weights=False)).eval()
    assert adapted.path_counts()["active"] == 2 * 2 * 64 * 4
    out = logits(adapted, ZOO["bert"].inputs())
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted, ZOO["bert"].inputs()), out, rtol=1e-3, atol=1e-3)


def test_what_repeats_beside_the_layers_gets_no_path() -> None:
    """Qwen3-VL's vision merges patches by a list of modules that change the width."""
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4}
    merged = {"spatial_merge_size": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1, 2]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    text = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "rope_parameters": rope, **heads}
    tokens = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, **merged}, **tokens)
    base = Qwen3VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 152, 150, 150, 150, 150, 153, 7]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == 150).int()}
    inputs |= {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    before = logits(base, inputs)
    adapted = get_peft_model(base, LoR2CConfig(r=4, init_weights=False)).eval()
    assert adapted.path_counts()["active"] == (4 + 3) * 2 * 32 * 4
    assert not torch.allclose(logits(adapted, inputs), before, rtol=1e-3, atol=1e-3)
