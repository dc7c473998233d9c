"""DDP and FSDP2 on two gloo processes: the losses of one process, and adapters that one process reloads."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from two_processes import CASES, METHODS, PLAIN_RANK, STEPS, STRATEGIES, base, build, first_logits, steps, work

from fresh import Fresh
from methods_table import logits
from plain_models import LAYERS
from tolerance import assert_models_agree, model_rounding
from ziggurat import plain_lora
from ziggurat.export import lora_pairs
from zoo import ZOO


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fresh: Fresh) -> Path:
    out = tmp_path_factory.mktemp("two")
    fresh.run_two(work, str(out))
    return out


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(case: str, strategy: str, trained: Path) -> None:
    alone = build(case)
    expected = steps(alone, slice(None), case, strategy)
    measured = json.loads((trained / "losses.json").read_text())[f"{case}-{strategy}"]
    # Each of the three steps starts from what the one before it has rounded.
    assert measured == pytest.approx(expected, rel=model_rounding(STEPS * LAYERS)) and len(set(measured)) == 3

    inputs = ZOO["llama"].inputs()
    alone.eval()
    for name in alone.peft_config:
        folder = trained / f"{case}-{strategy}" / ("" if name == "default" else name)
        alone.set_adapter(name)
        held = load_file(folder / "adapter_model.safetensors")
        parameters_alone = sum(parameter.numel() for parameter in alone.parameters() if parameter.requires_grad)
        assert sum(tensor.numel() for tensor in held.values()) == parameters_alone
        again = PeftModel.from_pretrained(base(case), str(folder)).eval()
        # Here too, and by what the steps have rounded the adapters differ.
        assert_models_agree(logits(again, inputs), logits(alone, inputs), (STEPS + 1) * LAYERS)


@pytest.mark.parametrize("method", ["msplora", "lora2", "experts"])
def test_plain_lora_gathers_what_fsdp2_has_sharded(method: str, trained: Path) -> None:
    """The tensors that go to a server are those of the adapter that was saved."""
    again = PeftModel.from_pretrained(base(method), str(trained / f"{method}-fsdp2"))
    expected = plain_lora(again, rank=PLAIN_RANK).tensors
    actual = load_file(trained / f"{method}-plain.safetensors")
    assert actual.keys() == expected.keys() and len(actual) == 2 * len(lora_pairs(again))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_fsdp2_refuses_a_batch_without_a_sample_of_each_adapter(trained: Path) -> None:
    """Processes that reduce other gradients than each other would crash, or wait for ever."""
    answers = json.loads((trained / "answers.json").read_text())
    assert "sharded (by FSDP2 or a tp_plan), and this process has no sample of ['films']" in answers["set"]


def test_tensor_parallelism_is_refused_where_a_linear_layer_is_split(trained: Path) -> None:
    """Silently each process would train an adapter of its part, and one save it. Paths stand around whole layers."""
    answers = json.loads((trained / "answers.json").read_text())
    for method in ("msplora", "lora2"):
        assert "layers.0.self_attn.q_proj' is split over processes by tensor parallelism (tp_plan)" in answers[method]
    alone = first_logits(AutoModelForCausalLM.from_pretrained(trained / "llama"), METHODS["lor2c"]())
    assert_models_agree(torch.tensor(answers["lor2c"]), alone)
