"""The duties of every method to a user who trains: checkpointing, autocast, compile, Trainer with resume, TRL."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import versions
from methods_table import METHODS, enlarge, logits, zoo_config
from tolerance import assert_models_agree, model_rounding
from word_tokenizer import word_tokenizer
from zoo import ZOO, shallow

every_method = pytest.mark.parametrize("method", METHODS)


def adapted_model(method: str, model: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ZOO[model].build(), zoo_config(method, model, init_weights=False, **fields))


def gradients(model: PeftModel, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(**inputs, labels=labels).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_method
@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(method: str, model: str, use_reentrant: bool) -> None:
    adapted, inputs = adapted_model(method, model, lora_dropout=0.2).train(), ZOO[model].inputs()
    labels = torch.tensor([0, 1]) if model == "bert" else inputs["input_ids"]
    plain = gradients(adapted, inputs, labels)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    adapted.enable_input_require_grads()
    again = gradients(adapted, inputs, labels)
    assert set(again) == set(plain)
    assert any(METHODS[method].prefix in name for name in plain)
    size = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert_models_agree(again[name], gradient, size=size, name=name)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(method: str, dtype: torch.dtype) -> None:
    adapted, inputs = adapted_model(method, "llama").train(), ZOO["llama"].inputs()
    enlarge(adapted, method)
    torch.manual_seed(1)  # DyLoRA draws its rank
    exact = adapted(**inputs, labels=inputs["input_ids"])
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        actual = adapted(**inputs, labels=inputs["input_ids"])
    actual.loss.backward()
    without = logits(ZOO["llama"].build(), inputs)
    assert_models_agree(actual.logits.float(), exact.logits, dtype=dtype, without=without)
    # A mean of log-probabilities is off by at most twice what the logits are.
    largest = 2 * float(exact.logits.detach().abs().max())
    torch.testing.assert_close(actual.loss.float(), exact.loss, rtol=0.0, atol=largest * model_rounding(dtype=dtype))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trained)


@versions.compiles
@versions.compiles_whole
@pytest.mark.parametrize(
    ("method", "model"),
    # Of the kit's, one with frozen factors and one whose layers come to read others.
    [(name, "bert") for name, row in METHODS.items() if not row.kit or name in ("loraxs", "aslora")]
    + [("dylora", "llama")],
)
def test_compile_without_graph_breaks(method: str, model: str) -> None:
    """Decoders of the other methods are compiled in test_torch.py."""
    torch.manual_seed(0)
    adapted = get_peft_model(shallow(model), zoo_config(method, model, init_weights=False)).eval()
    inputs = ZOO[model].inputs()
    expected = logits(adapted, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    assert_models_agree(logits(compiled, inputs), expected)


def texts(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (count, 7), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def trainer(method: str, folder: Path, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(ZOO["bert"].build(), zoo_config(method, "bert", lora_dropout=0.1))
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "save_strategy": "steps",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=texts(), eval_dataset=texts(8))


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.kit or name == "aslora"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    whole = trainer(method, tmp_path / "whole")
    whole.train()
    resumed = trainer(method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    trained = dict(resumed.model.named_parameters())
    assert resumed.state.global_step == 6
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


@every_method
def test_the_best_model_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    run = trainer(
        method, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    run.train()
    best = PeftModel.from_pretrained(ZOO["bert"].build(), run.state.best_model_checkpoint).eval()
    inputs = ZOO["bert"].inputs()
    assert torch.equal(logits(run.model.eval(), inputs), logits(best, inputs))


@every_method
def test_a_plain_loop_learns(method: str) -> None:
    adapted, inputs = adapted_model(method, "llama").train(), ZOO["llama"].inputs()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)
    losses = []
    for _ in range(25):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@every_method
def test_trl_makes_the_adapter_itself(method: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    ids = torch.randint(5, 100, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    model = ZOO["llama"].build()
    run = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=zoo_config(method, "llama"),
        processing_class=_tokenizer(),
    )
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path / "adapter")).eval()
    inputs = ZOO["llama"].inputs()
    trained = logits(run.model.eval(), inputs)
    assert torch.equal(logits(loaded, inputs), trained)
    assert not torch.equal(trained, logits(ZOO["llama"].build(), inputs))


def _tokenizer() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return word_tokenizer((f"w{i}" for i in range(96)), **special)
