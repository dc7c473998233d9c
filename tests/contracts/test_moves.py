"""An adapter that hardly moves is told after the warm-up, in every Trainer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.host.lifecycle import NEARLY_ZERO, check_moves
from ziggurat.host.method_layer import MethodLayer
from zoo import ZOO

LLAMA = ZOO["llama"]


@pytest.mark.parametrize(
    ("fields", "rate", "warned"),
    [({}, 1e-3, True), ({"init_weights": "orthonormal"}, 1e-3, False), ({"init_weights": "orthonormal"}, 1e-9, True)],
)
def test_an_adapter_that_is_nearly_zero_after_its_warm_up_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], rate: float, warned: bool
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.build(), LoRA2Config(r=4, target_rank=4, target_modules=LLAMA.targets, **fields))
    ids = torch.randint(5, 100, (16, 7)).tolist()
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=rate,
        warmup_steps=2,
        max_steps=8,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    with caplog.at_level(logging.WARNING, logger="ziggurat"):
        Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids})).train()
    messages = [text for text in caplog.messages if "nearly zero" in text]
    assert len(messages) == warned
    for text in messages:
        assert text.startswith("at step 7 of 8, after the warm-up, the update of adapter 'default' (LoRA²) is still")
        assert f"Raise the learning rate (now {rate:g})" in text


@pytest.mark.parametrize("config", [MSPLoraConfig(r=4, target_modules=LLAMA.targets), LoR2CConfig(r=4)])
@pytest.mark.parametrize(("factor", "warned"), [(1.1, False), (0.9, True)])
def test_the_size_of_an_update_is_that_of_the_dense_matrix(
    config: Any, factor: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A little above the bound nothing is said, a little below it is, at linear layers and on paths."""
    config.init_weights = False
    model = get_peft_model(LLAMA.build(), config)
    pairs = [layer.effective_pair("default") for layer in model.modules() if isinstance(layer, MethodLayer)]
    largest = max(float((B @ A).detach().norm()) / B.shape[0] ** 0.5 for A, B in pairs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_((factor * NEARLY_ZERO / largest) ** 0.5)  # A and B, so the update gets the whole factor
    check_moves(model, "here", 1.0)
    assert ("nearly zero" in caplog.text) is warned
