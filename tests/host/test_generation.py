"""While a model generates, each adapted layer computes its pair once; a change between two calls is noticed."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from methods_table import METHODS, zoo_config
from ziggurat.host.generation import keeping_pairs
from ziggurat.host.linear import KEPT, AdaptedLinear
from zoo import ZOO

pairs = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.merges])


def adapted(method: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ZOO["llama"].build(), zoo_config(method, "llama", init_weights=False)).eval()


def answer(model: Any, tokens: int = 6) -> Tensor:
    prompt = torch.tensor([[5, 7, 3, 2]])
    return model.generate(input_ids=prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def layers(model: PeftModel) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def counted(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters whose pairs are computed from now on, one entry each time."""
    computed: list[str] = []
    for layer in layers(model):
        effective = layer.effective_pair

        def noted(adapter: str, *context: Any, effective: Any = effective) -> Any:
            computed.append(adapter)
            return effective(adapter, *context)

        monkeypatch.setattr(layer, "effective_pair", noted)
    return computed


@pairs
def test_each_pair_is_computed_once_and_the_answer_is_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(method)
    expected = answer(model.get_base_model())  # transformers' own, around the same layers
    computed = counted(model, monkeypatch)
    assert torch.equal(answer(model), expected)
    assert len(computed) == len(layers(model)) > 0
    assert not any(KEPT in layer.__dict__ for layer in layers(model))


def change_in_place(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(-3)


def change_past_the_version(parameter: torch.nn.Parameter) -> None:
    parameter.data.mul_(-3)


def replace_data(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data * -3


@pytest.mark.parametrize("change", [change_in_place, change_past_the_version, replace_data])
@pairs
def test_a_factor_that_changes_between_two_calls_is_seen(method: str, change: Any) -> None:
    model = adapted(method)
    answer(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            change(parameter)
    assert torch.equal(answer(model), answer(model.get_base_model()))


def test_nothing_is_kept_where_a_hook_may_bring_the_factors_or_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("msplora")
    with pytest.raises(ValueError, match="in the middle"):
        keeping_pairs(model, lambda: (_ for _ in ()).throw(ValueError("in the middle")))()
    assert not any(KEPT in layer.__dict__ for layer in layers(model))
    layers(model)[0].register_forward_pre_hook(lambda *_: None)
    computed = counted(model, monkeypatch)
    answer(model, tokens=3)
    assert len(computed) == 3 * len(layers(model))


def test_a_model_that_cannot_generate_still_says_so() -> None:
    model = get_peft_model(ZOO["bert"].build(), zoo_config("msplora", "bert"))
    assert not hasattr(model.base_model, "generate") or not hasattr(model.get_base_model(), "generate")
