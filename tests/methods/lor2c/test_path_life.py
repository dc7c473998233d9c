"""Paths in real use: spans under compile, threads, generation, copies, several adapters; nothing is left behind."""

import copy
import gc
import io
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ModelOutput

import versions
from methods_table import logits
from plain_models import Block, PlainList
from tolerance import assert_models_agree
from ziggurat import LoR2CConfig
from ziggurat.errors import ConfigError
from ziggurat.host.paths.layer import HANDOVER, path_of
from zoo import ZOO, shallow

SPANS = [(0, 2), (3, 3)]


def adapted(model: str = "llama", base: nn.Module | None = None, seed: int = 0, **fields: Any) -> PeftModel:
    torch.manual_seed(seed)
    fields = {"r": 4, "init_weights": False, "spans": SPANS, **fields}
    return get_peft_model(ZOO[model].build() if base is None else base, LoR2CConfig(**fields)).eval()


def frames(model: nn.Module) -> list[Any]:
    """Whether a forward is running, by each hand-over in `model`."""
    given = [m.__dict__[HANDOVER] for m in model.modules() if HANDOVER in m.__dict__]
    return [getattr(each._local, "frame", None) is not None or each._traced is not None for each in given]


@versions.compiles
@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_spans_compile_without_breaks(model: str) -> None:
    spans = {"encoder.block": [[0, 1]], "decoder.block": [[0, 1]]} if model == "t5" else [[0, 1]]
    paths, inputs = adapted(model, shallow(model), spans=spans), dict[str, Any](ZOO[model].inputs())
    if model == "t5":
        inputs["use_cache"] = False  # torch 2.11 can't follow how the cache of an encoder-decoder copies a config
    expected = logits(paths, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(paths, fullgraph=True, backend="eager")
    assert_models_agree(logits(compiled, inputs), expected)
    assert frames(paths)
    assert not any(frames(paths))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_generation_with_and_without_cache_and_left_padding(settings: dict[str, Any]) -> None:
    model = adapted(lora_alpha=64)
    padded = {
        "input_ids": torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(model.generate(**padded, max_new_tokens=8, min_new_tokens=8, use_cache=use_cache, **settings))
    assert torch.equal(runs[0], runs[1])
    if not settings:
        alone = model.generate(input_ids=torch.tensor([[7, 8, 9]]), max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(alone[0, 3:], runs[0][0, 5:])
        with model.disable_adapter():
            bare = model.generate(**padded, max_new_tokens=8, min_new_tokens=8)
        assert not torch.equal(bare, runs[0])


def test_two_threads_on_one_model_never_mix() -> None:
    """One thread stops inside the span while the other goes through it."""
    model = adapted()
    layers = model.get_base_model().model.layers
    first = {"input_ids": torch.tensor([[5, 6, 7]])}
    second = {"input_ids": torch.tensor([[30, 40, 50]])}
    expected = [logits(model, first), logits(model, second)]
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "slow":
            inside.set()
            assert go_on.wait(30)

    hook = layers[1].register_forward_hook(wait)
    inputs_seen: list[Tensor] = []
    slow = threading.Thread(target=lambda: inputs_seen.append(logits(model, first)), name="slow")
    slow.start()
    assert inside.wait(30)
    fast = logits(model, second)
    go_on.set()
    slow.join(30)
    hook.remove()
    assert torch.equal(inputs_seen[0], expected[0])
    assert torch.equal(fast, expected[1])


def test_nothing_handed_over_survives_a_forward() -> None:
    model = adapted("plain_list", spans=[(0, 2)])
    alive: list[weakref.ref] = []
    blocks = model.get_base_model().blocks
    blocks[0].register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    model(**ZOO["plain_list"].inputs())
    model.requires_grad_(False)(**ZOO["plain_list"].inputs())
    gc.collect()
    assert len(alive) == 2
    assert alive[1]() is None
    assert not any(frames(model))


def test_an_aborted_forward_leaves_nothing() -> None:
    model, inputs = adapted(), ZOO["llama"].inputs()
    expected = logits(model, inputs)
    layers = model.get_base_model().model.layers
    handle = layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(**inputs)
    assert not any(frames(model))
    handle.remove()
    assert torch.equal(logits(model, inputs), expected)


MADE: list[nn.Module] = []
WHOLE: list[nn.Module] = []


def duplicate(*_: Any) -> None:
    """A hook, not local so that it can be pickled with the model it stands in."""
    if not MADE:
        file = io.BytesIO()
        torch.save(WHOLE[0], file)
        file.seek(0)
        MADE.extend([copy.deepcopy(WHOLE[0]), torch.load(file, weights_only=False)])


def test_copies_and_pickles_take_no_tensors_along() -> None:
    """Made in the middle of a forward, and used after it."""
    model, inputs = adapted(), ZOO["llama"].inputs()
    MADE.clear()
    WHOLE[:] = [model]
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(duplicate)
    expected = logits(model, inputs)
    handle.remove()
    assert len(MADE) == 2
    for twin in MADE:
        assert frames(twin) == [False]
        assert torch.equal(logits(twin, inputs), expected)
        path_of(twin.get_base_model().model.layers[2]).stores["default"]["B"].data.zero_()
        assert not torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)


def test_adapters_with_different_spans_stay_apart() -> None:
    inputs = ZOO["llama"].inputs()
    model = adapted()
    model.add_adapter("other", LoR2CConfig(r=2, init_weights=False, spans=[(1, 3)]))
    alone = {"default": logits(model, inputs)}
    model.set_adapter("other")
    alone["other"] = logits(model, inputs)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model, inputs)
    assert not torch.equal(together, alone["default"])
    assert not torch.equal(together, alone["other"])
    mixed = logits(model, {**inputs, "adapter_names": ["other", "default"]})
    assert_models_agree(mixed, torch.stack([alone["other"][0], alone["default"][1]]))
    based = logits(model, {**inputs, "adapter_names": ["__base__", "default"]})
    assert_models_agree(based[0], logits(ZOO["llama"].build(), inputs)[0])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**inputs, adapter_names=["nobody", "default"])
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), alone["other"])


def test_modules_keep_the_names_that_torch_calls() -> None:
    """`nn.Module.apply` goes through every module, as DeepSpeed does with any model."""
    paths, seen = adapted(), []
    paths.apply(lambda module: seen.append(id(module)))
    assert set(seen) == {id(module) for module in paths.modules()}


def test_unload_takes_every_hook_away() -> None:
    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    bare = adapted("bert").unload()
    assert hooks(bare) == hooks(ZOO["bert"].build())
    assert not any(HANDOVER in m.__dict__ for m in bare.modules())


def test_layer_drop_reads_what_the_first_layer_that_ran_read() -> None:
    model = adapted("plain_list", spans=[(0, 2)])
    base, x = model.get_base_model(), ZOO["plain_list"].inputs()["x"]

    def skipping(x: Tensor) -> Tensor:
        x = base.stem(x)
        for number, block in enumerate(base.blocks):
            if number != 0:
                x = block(x)
        return base.head(x)

    path = path_of(base.blocks[2])
    a, b = path.effective_pair("default")
    with torch.no_grad():
        plain = list(ZOO["plain_list"].build().blocks)
        start = base.stem(x)
        expected = base.head(plain[3](plain[2](plain[1](start)) + start @ a.T @ b.T))
        base.forward = skipping
        assert_models_agree(base(x), expected)


def test_layers_run_alone_refuse_spans() -> None:
    model = adapted("plain_list", spans=[(0, 2)]).train()
    with pytest.raises(RuntimeError, match=r"path over layers 0 to 2 .* Call the layers through that module"):
        model.get_base_model().blocks[0](ZOO["plain_list"].inputs()["x"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_paths_around_single_layers_bear_any_checkpointing(use_reentrant: bool) -> None:
    model = adapted("plain_list", spans=None).train()
    base, x = model.get_base_model(), ZOO["plain_list"].inputs()["x"].requires_grad_()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()

    def checkpointed(x: Tensor) -> Tensor:
        x = base.stem(x)
        for block in base.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return base.head(x)

    base.forward = checkpointed
    again = gradients()
    assert len(again) == len(plain) == 8
    for tensor, other in zip(again, plain, strict=True):
        assert_models_agree(tensor, other)


class Strange(nn.Module):
    """A layer that returns something else than hidden states, or changes their shape."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.norm, self.what = nn.Linear(8, 8), nn.LayerNorm(8), what

    def forward(self, x: Tensor) -> Any:
        if self.what == "output":
            return ModelOutput(hidden=self.linear(x))
        return self.linear(x[:, ::2])


@pytest.mark.parametrize(
    ("what", "message"), [("output", "returns a ModelOutput"), ("shape", "has the shape of their input")]
)
def test_layers_that_no_path_can_go_around(what: str, message: str) -> None:
    base = nn.Module()
    base.layers = nn.ModuleList(Strange(what) for _ in range(2))
    base.forward = lambda x: base.layers[0](x)
    model = get_peft_model(base, LoR2CConfig(r=2))
    with pytest.raises(ConfigError, match=message):
        model(torch.randn(2, 4, 8))


def test_layers_that_run_all_their_children_are_refused() -> None:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
    base = PlainList(layers)
    with pytest.raises(ConfigError, match="Wrap it in a module of its own"):
        get_peft_model(base, LoR2CConfig(r=2))
    assert not any("residual_path" in name for name, _ in base.named_modules())


def test_a_layer_with_an_attribute_of_that_name_is_refused() -> None:
    blocks = [Block() for _ in range(2)]
    blocks[1].residual_path = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Rename it"):
        get_peft_model(base := PlainList(blocks), LoR2CConfig(r=2))
    assert path_of(base.blocks[0]) is None


def test_merging_refuses_and_names_what_works() -> None:
    model = adapted("bert")
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"can't be merged into weights.*ziggurat merge"):
            call()
    if versions.Version("0.20") <= versions.PEFT:  # which brought convert_to_lora
        assert model.base_model.supports_lora_conversion() is False


@versions.saves_whole
def test_adapters_around_different_layers_are_not_summed() -> None:
    model = adapted(spans=None, merges=1)
    model.restructure(0, 1)
    model.restructure(1, 1)
    model.add_adapter("second", LoR2CConfig(r=4, init_weights=False))
    with pytest.raises(ValueError, match="paths around different layers"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config
