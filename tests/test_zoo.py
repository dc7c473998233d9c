"""The models that the other tests stand on: they run, are the same each time, and LoRA trains on them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import versions
from zoo import ZOO


def first_output(outputs: object) -> Tensor:
    """The logits, or what a model without a head gives first."""
    if isinstance(outputs, Tensor):
        return outputs
    return next(getattr(outputs, name) for name in ("logits", "logits_per_text") if hasattr(outputs, name))


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_same_each_time_and_leaves_the_random_state(name: str) -> None:
    entry = ZOO[name]
    state = torch.random.get_rng_state()
    first, second = entry.build(), entry.build()
    inputs, again = entry.inputs(), entry.inputs()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    with torch.no_grad():
        result = first_output(first(**inputs))
        torch.testing.assert_close(first_output(second(**inputs)), result, rtol=0, atol=0)
    assert result.isfinite().all()
    assert result.std() > 0
    assert sum(weight.numel() for weight in first.parameters()) < 100_000


@pytest.mark.parametrize("name", ZOO)
def test_every_default_target_is_reached_by_the_gradient(name: str) -> None:
    entry = ZOO[name]
    versions.skip_where_lora_fails(entry.task_type)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=entry.targets, task_type=entry.task_type, init_lora_weights=False)
    model = get_peft_model(entry.build(), config)
    first_output(model(**entry.inputs())).square().sum().backward()
    factors = {path: weight for path, weight in model.named_parameters() if "lora_" in path}
    assert factors
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in factors.values())
