"""DyLoRA against its equation, at every rank it can be cut to."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from methods_table import logits
from tolerance import assert_models_agree
from ziggurat import DyLoRAConfig
from ziggurat.errors import ConfigError
from ziggurat.host.draws import Draws
from ziggurat.host.linear import AdaptedLinear
from ziggurat.methods.dylora import METHOD
from zoo import ZOO


def adapted(**fields: object) -> PeftModel:
    torch.manual_seed(0)
    values = {"r": 4, "target_modules": ["query", "value"], "lora_alpha": 6, "init_weights": False, **fields}
    return get_peft_model(ZOO["bert"].build(), DyLoRAConfig(**values))  # type: ignore[arg-type]


def draws(model: PeftModel) -> Draws:
    actual = Draws.on(model.get_base_model(), METHOD)
    assert actual is not None
    return actual


def linears(model: torch.nn.Module) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_drawn_rank_uses_and_teaches_just_its_directions(rank: int, frozen: bool) -> None:
    model = adapted(frozen=frozen).double()
    layer = linears(model)[0].train()
    draws(model).last = {"default": rank}
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    A, B = layer.stored("default").values()
    base = layer.base_layer(x)
    y = layer(x)
    torch.testing.assert_close(y, base + 6 / rank * x @ A[:rank].T @ B[:, :rank].T, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    assert A.grad is not None and B.grad is not None
    learns = [bool(A.grad[i].any()) and bool(B.grad[:, i].any()) for i in range(4)]
    still = [not A.grad[i].any() and not B.grad[:, i].any() for i in range(4)]
    expected = [i == rank - 1 if frozen else i < rank for i in range(4)]
    assert learns == expected and still == [not item for item in expected]


def test_every_forward_in_training_draws_one_rank_for_all_linears() -> None:
    model, inputs = adapted(min_rank=2), ZOO["bert"].inputs()
    seen = set()
    for seed in range(24):
        torch.manual_seed(seed)
        model.train()(**inputs)
        ranks = {layer.context("default").drawn for layer in linears(model)}
        assert len(ranks) == 1
        seen |= ranks
    assert seen == {2, 3, 4}
    model.eval()
    torch.testing.assert_close(logits(model, inputs), logits(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 3])
def test_merging_in_training_mode_takes_the_inference_rank(rank: int) -> None:
    model, inputs = adapted(inference_rank=rank), ZOO["bert"].inputs()
    expected = logits(model.eval(), inputs)
    model.train()
    draws(model).draw()
    merged = model.merge_and_unload().eval()
    assert_models_agree(logits(merged, inputs), expected)
    assert not merged._forward_pre_hooks


def test_a_saved_adapter_is_cut_when_it_is_loaded(tmp_path: Path) -> None:
    model, inputs = adapted(), ZOO["bert"].inputs()
    model.save_pretrained(str(tmp_path))
    config = DyLoRAConfig.from_pretrained(str(tmp_path))
    config.inference_rank = 2
    cut = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path), config=config).eval()
    for mine, whole in zip(linears(cut), linears(model), strict=True):
        A, B = mine.effective_pair("default")
        assert A.shape[0] == 2
        all_A, all_B = whole.stored("default").values()
        torch.testing.assert_close(B @ A, 6 / 2 * all_B[:, :2] @ all_A[:2])
    assert not torch.equal(logits(cut, inputs), logits(model.eval(), inputs))


def test_models_that_draw_can_be_copied_and_pickled() -> None:
    model, inputs = adapted(), ZOO["bert"].inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin.eval(), inputs), logits(model.eval(), inputs), rtol=0, atol=0)


def test_checkpointing_runs_with_the_same_draw() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = adapted().train(), ZOO["bert"].inputs()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        torch.use_deterministic_algorithms(True)
        try:
            model(**inputs)[0].square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if "dylora_" in n and p.grad is not None])
    size = max(float(gradient.abs().max()) for gradient in gradients[0])
    for each, other in zip(*gradients, strict=True):
        assert_models_agree(each, other, size=size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_rank": 5}, "min_rank=5: a whole number from 1 to r=4"),
        ({"min_rank": 0}, "min_rank=0"),
        ({"inference_rank": 9}, "inference_rank=9"),
        ({"r": 400}, "r=400 is above the matrix"),
    ],
)
def test_ranks_that_cannot_be(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**fields)
