"""Stacks, layers and roles are found by structure, in every architecture, with and without adapters."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import versions
from plain_models import LAYERS, WIDTH, Block, PlainList
from ziggurat.errors import AnatomyError
from ziggurat.host.base.anatomy import Anatomy, Place
from zoo import ZOO

every_model = pytest.mark.parametrize("name", ZOO)
HYBRIDS = {"jamba", "zamba"}  # only some of their layers have attention


def module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


def target_names(model: nn.Module, targets: list[str]) -> list[str]:
    return [name for name in module_names(model) if name.split(".")[-1] in targets]


def holder(**children: nn.Module) -> nn.Module:
    """A module with these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def blocks(count: int, width: int = WIDTH) -> list[nn.Module]:
    return [Block(width) for _ in range(count)]


# --- every architecture ---------------------------------------------------------------------------


@every_model
def test_stacks_are_found(name: str) -> None:
    model = ZOO[name].build()
    assert Anatomy(model).stacks == ZOO[name].stacks


@every_model
def test_a_place_leads_back_to_its_module(name: str) -> None:
    model = ZOO[name].build()
    anatomy = Anatomy(model)
    inside = 0
    for path in module_names(model):
        place = anatomy.find(path)
        if place is None:
            if name != "plain_sequential":  # its list holds the stem and the head too
                assert not path.startswith(tuple(f"{stack}." for stack in anatomy.stacks))
            continue
        inside += 1
        layer = anatomy.layers(place.stack)[place.layer]
        assert path == (f"{layer}.{place.role}" if place.role else layer)
        assert place.num_layers == anatomy.stacks[place.stack] == len(anatomy.layers(place.stack))
        assert anatomy.place(path) == place
    assert bool(inside) == bool(ZOO[name].stacks)


@every_model
def test_each_role_is_in_every_layer_and_of_one_shape(name: str) -> None:
    model, targets = ZOO[name].build(), ZOO[name].targets
    anatomy = Anatomy(model)
    layers, shapes = defaultdict(list), defaultdict(set)
    for path in target_names(model, targets):
        place = anatomy.find(path)
        if place is None:
            assert name == "no_stack"
            continue
        layers[place.stack, place.role].append(place.layer)
        shapes[place.stack, place.role].add(model.get_submodule(path).weight.shape)
    assert {stack for stack, _ in layers} == set(ZOO[name].stacks)
    for (stack, role), numbers in layers.items():
        if name in HYBRIDS:
            assert numbers == sorted(set(numbers)) and 0 < len(numbers) < anatomy.stacks[stack]
        else:
            assert numbers == list(range(anatomy.stacks[stack])), role
        assert len(shapes[stack, role]) == 1


@every_model
def test_adapters_change_no_place(name: str) -> None:
    entry = ZOO[name]
    versions.skip_where_lora_fails(entry.task_type)
    model = entry.build()
    names = module_names(model)
    bare = Anatomy(model)
    before = {path: bare.find(path) for path in names}
    targets = target_names(model, entry.targets)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, task_type=entry.task_type))
    for seen in (wrapped, wrapped.base_model, wrapped.base_model.model):
        anatomy = Anatomy(seen)
        assert anatomy.stacks == bare.stacks
        assert [anatomy.layers(stack) for stack in anatomy.stacks] == [bare.layers(stack) for stack in bare.stacks]
        assert {path: anatomy.find(path) for path in names} == before
    anatomy = Anatomy(wrapped)
    for path in targets:
        for inside in ("", ".base_layer", ".lora_A", ".lora_A.default", ".lora_dropout.default"):
            assert anatomy.find(f"base_model.model.{path}{inside}") == before[path]


def test_two_adapters_of_different_kinds_are_looked_through() -> None:
    entry = ZOO["plain_sequential"]
    model = entry.build()
    before = {path: Anatomy(model).find(path) for path in module_names(model)}
    config = LoraConfig(target_modules=["net.1.query", "net.2.mlp.0", "net.0"], modules_to_save=["net.3"])
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("second", LoraConfig(target_modules=["value", "query"]))
    anatomy = Anatomy(wrapped.base_model.model)
    assert anatomy.stacks == entry.stacks
    assert {path: anatomy.find(path) for path in before} == before
    assert anatomy.find("net.3.original_module.query") == before["net.3.query"]
    assert anatomy.find("net.3.modules_to_save.default.query") == before["net.3"]


class OwnLayer(nn.Module, BaseTunerLayer):
    """What an adapter adds without wrapping anything, with a list of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(blocks(3))


def test_what_an_adapter_adds_beside_the_modules_is_not_the_model() -> None:
    model = PlainList(blocks(3))
    before = Anatomy(model)
    model.add_module("shared", OwnLayer())
    model.blocks[1].add_module("path", OwnLayer())
    anatomy = Anatomy(model)
    assert anatomy.stacks == before.stacks == {"blocks": 3}
    assert anatomy.find("blocks.1.path.parts.2.query") == Place("blocks", 1, "", 3)
    assert anatomy.find("shared.parts.2.query") is None


# --- experts, shared layers, parameters -----------------------------------------------------------


def test_experts_in_a_list_are_roles_not_layers() -> None:
    anatomy = Anatomy(ZOO["plain_experts"].build())
    assert anatomy.place("blocks.2.experts.1.query") == Place("blocks", 2, "experts.1.query", LAYERS)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts_have_a_place_as_module_and_as_parameter(name: str) -> None:
    anatomy = Anatomy(ZOO[name].build())
    assert anatomy.place("model.layers.3.mlp.experts") == Place("model.layers", 3, "mlp.experts", LAYERS)
    assert anatomy.place("model.layers.3.mlp.experts.down_proj").role == "mlp.experts.down_proj"
    assert anatomy.find("model.layers.3.mlp.experts.down_proj.more") is None


def test_t5_decoder_blocks_have_a_role_more_than_encoder_blocks() -> None:
    model = ZOO["t5"].build()
    anatomy = Anatomy(model)
    roles = defaultdict(set)
    for path in target_names(model, ["q"]):
        roles[anatomy.place(path).stack].add(anatomy.place(path).role)
    assert roles["encoder.block"] == {"layer.0.SelfAttention.q"}
    assert roles["decoder.block"] == {"layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"}


def test_albert_has_one_layer_and_the_pattern_can_name_the_inner_list() -> None:
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16, inner_group_num=2
    )
    model = transformers.AlbertModel(config)
    query = "encoder.albert_layer_groups.0.albert_layers.1.attention.query"
    assert Anatomy(model).place(query).num_layers == 1
    place = Anatomy(model, layers_pattern="albert_layers").place(query)
    assert place == Place("encoder.albert_layer_groups.0.albert_layers", 1, "attention.query", 2)


def test_a_module_listed_twice_is_one_layer() -> None:
    first, second = blocks(2)
    anatomy = Anatomy(PlainList([first, second, first, second]))
    assert anatomy.stacks == {"blocks": 2}
    assert anatomy.layers("blocks") == ["blocks.0", "blocks.1"]
    assert anatomy.place("blocks.3.query") == anatomy.place("blocks.1.query") == Place("blocks", 1, "query", 2)


# --- the rule, on structures made for it ----------------------------------------------------------


def openelm(count: int) -> list[nn.Module]:
    """Layers of one class that all differ in width inside."""
    return [holder(up=nn.Linear(8, 8 * n), norm=nn.LayerNorm(8)) for n in range(1, count + 1)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


STRUCTURES = {
    "one layer": (holder(layers=nn.ModuleList(blocks(1))), {"layers": 1}),
    "one layer of experts": (holder(layers=nn.ModuleList([nn.ModuleList(blocks(3))])), {"layers": 1}),
    "one layer in a Sequential": (nn.Sequential(*blocks(1)), {"": 1}),
    "a whole model in a Sequential": (nn.Sequential(PlainList(blocks(3)), nn.Identity()), {"0.blocks": 3}),
    "a whole model alone in a Sequential": (nn.Sequential(PlainList(blocks(3))), {"0.blocks": 3}),
    "encoder and decoder in a list": (
        nn.ModuleList([holder(layers=nn.ModuleList(blocks(2))), PlainList(blocks(3))]),
        {"0.layers": 2, "1.blocks": 3},
    ),
    "an MLP in a Sequential": (holder(mlp=mlp()), {}),
    "heads": (holder(heads=nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])), {}),
    "layers without a class": (holder(layers=nn.ModuleList([mlp(), mlp(), mlp()])), {"layers": 3}),
    "all layers of another width": (holder(layers=nn.ModuleList(openelm(4))), {"layers": 4}),
    "stages of lists": (  # SegFormer
        holder(block=nn.ModuleList([nn.ModuleList(blocks(2, 8)), nn.ModuleList(blocks(3, 16))])),
        {"block.0": 2, "block.1": 3},
    ),
    "named dictionary": (holder(transformer=nn.ModuleDict({"wte": nn.Embedding(9, 8), "h": nn.ModuleList(blocks(2))})),
        {"transformer.h": 2},
    ),
    "numbered dictionary": (holder(layers=nn.ModuleDict({str(n): Block() for n in range(3)})), {"layers": 3}),
    "TransformerEncoder": (
        holder(encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False)),
        {"encoder.layers": 3},
    ),
    "hybrid without a repetition": (holder(layers=nn.ModuleList([Block(), nn.TransformerEncoderLayer(16, 2)])), {}),
}  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rule(structure: str) -> None:
    model, stacks = STRUCTURES[structure]
    assert Anatomy(model).stacks == stacks


def test_members_without_modules_are_not_numbered() -> None:
    anatomy = Anatomy(ZOO["plain_sequential"].build())
    assert anatomy.layers("net") == [f"net.{n}" for n in range(1, LAYERS + 1)]
    assert anatomy.place("net.1.query") == Place("net", 0, "query", LAYERS)
    assert anatomy.find("net.0") is None and anatomy.find("net") is None


def test_a_layer_has_the_empty_role() -> None:
    assert Anatomy(ZOO["bert"].build()).place("bert.encoder.layer.3") == Place("bert.encoder.layer", 3, "", LAYERS)


def test_a_child_that_refers_to_its_parent_ends() -> None:
    model = PlainList(blocks(2))
    model.blocks[0].add_module("owner", model)
    assert Anatomy(model).stacks == {"blocks": 2}


def test_weights_on_meta_are_enough() -> None:
    with torch.device("meta"):
        model = PlainList(blocks(80))
    assert Anatomy(model).stacks == {"blocks": 80}


names = st.text("abcdefgh_", min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    way=st.lists(names.filter(lambda name: not hasattr(nn.Module, name)), max_size=4),
    count=st.integers(1, 6),
    kind=st.sampled_from(["list", "sequential", "dictionary"]),
)
def test_a_stack_is_found_wherever_it_lies(way: list[str], count: int, kind: str) -> None:
    layers = blocks(count, 2)
    numbered = {str(n): layer for n, layer in enumerate(layers)}
    model = {"list": nn.ModuleList, "sequential": lambda stack: nn.Sequential(*stack)}.get(
        kind, lambda _: nn.ModuleDict(numbered)
    )(layers)
    way = [*way, "stack"]
    for name in reversed(way):
        model = holder(**{name: model, f"{name}_head": mlp()})
    anatomy, stack = Anatomy(model), ".".join(way)
    assert anatomy.stacks == {stack: count}
    assert anatomy.place(f"{stack}.{count - 1}.mlp.2") == Place(stack, count - 1, "mlp.2", count)


# --- layers_pattern -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["layer", ["layer"], ["h", "encoder.layer"], r"lay\w+", "h|layer"])
def test_pattern_names_the_list_as_the_rule_finds_it(pattern: str | list[str]) -> None:
    model = ZOO["bert"].build()
    assert Anatomy(model, pattern).stacks == Anatomy(model).stacks


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_pattern_is_none(empty: str | list[str] | None) -> None:
    assert Anatomy(ZOO["bert"].build(), empty).stacks == ZOO["bert"].stacks


def test_pattern_is_obeyed_against_the_rule() -> None:
    swin = ZOO["swin"].build()
    assert Anatomy(swin, "encoder.layers").stacks == {"swin.encoder.layers": 2}
    t5 = Anatomy(ZOO["t5"].build(), "layer")
    assert t5.stacks["encoder.block.0.layer"] == 2 and t5.stacks["decoder.block.4.layer"] == 3
    towers = nn.ModuleList([PlainList(blocks(3)), PlainList(blocks(3))])
    assert Anatomy(towers).stacks == {"": 2}
    assert Anatomy(towers, "blocks").stacks == {"0.blocks": 3, "1.blocks": 3}


def test_pattern_matches_whole_components_only() -> None:
    with pytest.raises(AnatomyError, match="matches no list"):
        Anatomy(ZOO["llama"].build(), "ayers")
    with pytest.raises(AnatomyError, match="matches no list"):
        Anatomy(ZOO["llama"].build(), "layers.0")


def test_pattern_makes_linears_layers() -> None:
    model = holder(net=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert Anatomy(model).stacks == {}
    anatomy = Anatomy(model, "net")
    assert anatomy.layers("net") == ["net.0", "net.2"]
    assert anatomy.place("net.2") == Place("net", 1, "", 2)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["net.0", "net.2"]))
    assert Anatomy(wrapped, "net").place("net.2.lora_B.default") == Place("net", 1, "", 2)


def test_pattern_that_is_no_expression() -> None:
    with pytest.raises(AnatomyError, match=r"layers_pattern='\(h' is no regular expression .*Give the name"):
        Anatomy(ZOO["gpt2"].build(), "(h")


def test_pattern_that_matches_nothing_lists_what_is_there() -> None:
    with pytest.raises(AnatomyError) as caught:
        Anatomy(ZOO["t5"].build(), "layerz")
    text = str(caught.value)
    assert "layers_pattern='layerz' matches no list of layers in T5ForConditionalGeneration" in text
    assert "'encoder.block' (4 members)" in text and "Set layers_pattern" in text


# --- errors ---------------------------------------------------------------------------------------


def test_error_outside_every_stack() -> None:
    anatomy = Anatomy(ZOO["t5"].build())
    assert anatomy.find("lm_head") is None
    with pytest.raises(AnatomyError) as caught:
        anatomy.place("lm_head")
    assert str(caught.value) == (
        "module 'lm_head' of T5ForConditionalGeneration is in no stack of layers, so it has no layer number. "
        "Stacks: 'encoder.block' (4 layers), 'decoder.block' (5 layers). Other lists: none. If it is in one of these "
        "lists, set layers_pattern to the last part of the list's path; otherwise leave it out with target_modules "
        "or exclude_modules."
    )


def test_error_in_a_model_without_stacks() -> None:
    with pytest.raises(AnatomyError, match=r"Stacks: none\. Other lists: 'head' \(3 members\)\..*set layers_pattern"):
        Anatomy(ZOO["no_stack"].build()).place("lin0")


def test_long_listings_are_cut() -> None:
    model = holder(**{f"head{n}": mlp() for n in range(15)}, lin=nn.Linear(8, 8))
    with pytest.raises(AnatomyError, match=r"'head11' \(3 members\) and 3 more"):
        Anatomy(model).place("lin")


@pytest.mark.parametrize("path", ["bert.encoder.layr.0", "bert.encoder.layer.4", "", "query"])
def test_error_for_a_path_that_is_not_there(path: str) -> None:
    anatomy = Anatomy(ZOO["bert"].build())
    assert anatomy.find(path) is None
    with pytest.raises(AnatomyError, match=f"BertForSequenceClassification has no module '{path}'"):
        anatomy.place(path)


def test_error_for_an_unknown_stack() -> None:
    with pytest.raises(AnatomyError, match=r"'encoder' is no stack of layers of Bert.*'bert.encoder.layer' \(4 layers"):
        Anatomy(ZOO["bert"].build()).layers("encoder")
