"""LoRA² under a Trainer, TRL, and two processes: the regulariser in the loss, pruning by itself, resuming."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainerState, TrainingArguments

import versions
from fresh import Fresh
from methods_table import logits
from plain_models import WIDTH
from tolerance import assert_models_agree, assert_sums_agree
from word_tokenizer import word_tokenizer
from ziggurat import LoRA2Config
from ziggurat.errors import ConfigError
from ziggurat.export import export_model
from ziggurat.methods.lora2.callback import LoRA2Callback
from ziggurat.methods.lora2.pruning import adapted
from ziggurat.methods.lora2.ranks import table
from ziggurat.methods.lora2.regulariser import deviation, penalty
from zoo import ZOO


def model_of(kind: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    zoo = ZOO[kind]
    settings = {"r": 4, "outer_rank": 3, "target_rank": 2, "mask_interval": 1, "task_type": zoo.task_type}
    return get_peft_model(zoo.build(), LoRA2Config(**{**settings, "target_modules": zoo.targets, **fields}))


def examples(kind: str, count: int = 24) -> Dataset:
    """Texts of one length with labels; of labels that are texts, more and more are left out (-100)."""
    ids = torch.randint(5, 100, (count, 7), generator=torch.Generator().manual_seed(0))
    if kind in ("llama", "t5"):
        labels = [[-100] * (i % 6) + row[i % 6 :] for i, row in enumerate(ids.tolist())]
    else:
        labels = (ids[:, 0] % 3).tolist()
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})


class Gradients(TrainerCallback):
    """Keeps what the optimiser got at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trainer(model: nn.Module, kind: str, folder: Path, loss: Any = None, **arguments: Any) -> Trainer:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    return Trainer(
        model, TrainingArguments(str(folder), **settings), train_dataset=examples(kind), compute_loss_func=loss
    )


def regulariser_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of 0.1 times the deviation, by parameter."""
    names = {n: p for n, p in model.named_parameters() if "lora2_" in n and not n.endswith(".E")}
    gradients = torch.autograd.grad(0.1 * deviation(model), list(names.values()))
    return dict(zip(names, gradients, strict=True))


def outside(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("bert", {}),
        ("bert", {"gradient_accumulation_steps": 3}),
        ("llama", {"gradient_accumulation_steps": 3}),
        ("t5", {"gradient_accumulation_steps": 2}),
        ("bert", {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
        ("bert", {"gradient_accumulation_steps": 2, "loss": outside}),
    ],
)
def test_a_trainer_s_step_has_the_regulariser_once(kind: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """With E = 0 the task's loss has no gradient for U, V, v, u: what they get is the regulariser's alone."""
    model = model_of(kind)
    expected = regulariser_gradients(model)
    run, seen = trainer(model, kind, tmp_path, **arguments), Gradients()
    run.add_callback(seen)
    run.train()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0
        assert_sums_agree(seen.steps[0][name], gradient, 2 * WIDTH, depth=4, name=name)


def test_clipping_sees_the_regulariser(tmp_path: Path) -> None:
    model = model_of("bert")
    expected = regulariser_gradients(model)
    run, seen = trainer(model, "bert", tmp_path, max_grad_norm=1e-3), Gradients()
    run.add_callback(seen)
    run.train()
    (first,) = seen.steps
    norm = torch.stack([g.norm() for g in first.values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0.0)
    name = next(iter(expected))
    cosine = nn.functional.cosine_similarity(first[name].flatten(), expected[name].flatten(), dim=0)
    torch.testing.assert_close(cosine, torch.tensor(1.0), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_holds_the_regulariser_in_training_only(return_dict: bool) -> None:
    model, inputs = model_of("bert", orthogonality=0.3, cross_plane=2.0), ZOO["bert"].inputs()
    inputs |= {"labels": torch.tensor([0, 1])}

    def loss() -> Tensor:
        out = model(**inputs, return_dict=return_dict)
        return out.loss if return_dict else out[0]

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    bare = loss() if not model.training else model.eval() and loss()
    model.train()
    added = model.base_model.penalty()
    assert added is not None and float(added.detach()) > 0.3 * model.base_model.orthogonality()
    assert_models_agree(loss(), bare + added)
    with torch.no_grad():
        assert_models_agree(loss(), bare)
    with model.disable_adapter():
        assert penalty(model) is None
    model.set_requires_grad("default", False)
    assert penalty(model) is None


@versions.transformers_calls
def test_adapters_of_transformers_own_calls_are_regularised_too() -> None:
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    model.add_adapter(LoRA2Config(r=4, target_modules=ZOO["llama"].targets))
    expected = regulariser_gradients(model.train())
    inputs = ZOO["llama"].inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        assert_sums_agree(parameters[name].grad, gradient, 2 * WIDTH, depth=4)


def test_the_deviation_is_a_number_of_its_own_in_the_logs(tmp_path: Path) -> None:
    printed: list[dict[str, float]] = []

    class Printer(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            printed.append(dict(logs))

    model = model_of("bert", orthogonality=0.3)
    run = trainer(model, "bert", tmp_path, max_steps=4, logging_steps=2)
    run.eval_dataset = examples("bert", 8)
    run.add_callback(Printer())
    run.train()
    run.evaluate()
    training = [line for line in printed if "loss" in line]
    assert len(training) == 2
    assert training[-1]["orthogonality"] == pytest.approx(float(deviation(model).detach()))
    assert [line["orthogonality"] for line in run.state.log_history if "loss" in line] == [
        line["orthogonality"] for line in training
    ]
    assert not any("orthogonality" in line for line in printed if "eval_loss" in line)


@pytest.mark.parametrize("warmups", [(3, 4), (0.2, 0.4)])
def test_a_trainer_prunes_by_itself(
    warmups: tuple[float, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("bert", initial_warmup=warmups[0], final_warmup=warmups[1])
    run = trainer(
        model, "bert", tmp_path, max_steps=12, gradient_accumulation_steps=2, max_grad_norm=1.0, weight_decay=0.1
    )
    assert sum(isinstance(callback, LoRA2Callback) for callback in run.callback_handler.callbacks) == 1
    run.train()
    assert sum(model.base_model.ranks().values()) == 2 * 8
    assert table(model.get_base_model(), model.base_model.ranks()) in capsys.readouterr().err


def test_warmups_longer_than_the_run_stop_before_the_first_step(tmp_path: Path) -> None:
    model = model_of("bert", initial_warmup=3, final_warmup=4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"take 3 \+ 4 steps, but the run has 7"):
        trainer(model, "bert", tmp_path, max_steps=7).train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("at", [5, 10])
def test_a_resumed_run_prunes_bitwise_as_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    """Stopped while the budget shrinks (5) and with the final mask (10); the checkpoint has moved meanwhile."""

    def run(folder: Path) -> Trainer:
        model = model_of("bert", initial_warmup=2, final_warmup=4, lora_dropout=0.1, mask_interval=2)
        arguments = {"max_steps": 12, "save_strategy": "steps", "save_steps": at, "gradient_accumulation_steps": 2}
        return trainer(model, "bert", folder, max_grad_norm=1.0, weight_decay=0.1, **arguments)

    whole = run(tmp_path / "whole")
    whole.train()
    (tmp_path / "whole" / f"checkpoint-{at}").rename(tmp_path / "elsewhere")
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    again = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again[name]), name
    ours, theirs = whole.model.base_model.pruning_state(), resumed.model.base_model.pruning_state()
    assert ours.keys() == theirs.keys() and len(ours) == 4 * 8
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert sum(resumed.model.base_model.ranks().values()) == 16


def test_resuming_from_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer(model_of("bert"), "bert", tmp_path, **arguments).train()
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    saved = json.loads(state.read_text())
    assert saved["stateful_callbacks"]["ziggurat.lora2"]["format"] == "safetensors, base64"
    del saved["stateful_callbacks"]["ziggurat.lora2"]
    state.write_text(json.dumps(saved))
    resumed = trainer(model_of("bert"), "bert", tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # warns, and starts its averages anew
    assert sum(resumed.model.base_model.ranks().values()) == 16


def test_loss_scaling_changes_no_average() -> None:
    """GradScaler: gradients are unscaled when the step is over; a step it skipped is not learned from."""
    states = []
    for scale in (None, 2.0**12):
        model, inputs = model_of("bert").eval(), ZOO["bert"].inputs() | {"labels": torch.tensor([0, 1])}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(1, 4):
            scaler.scale(model(**inputs).loss).backward()
            if step == 2 and scale:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            if step != 2 or scale:
                scaler.step(optimizer)
                scaler.update()
                model.prune(step, 40)
            optimizer.zero_grad()
        states.append(model.base_model.pruning_state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor.float(), states[1][name].float(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("already_unscaled", [False, True])
def test_the_regulariser_of_a_loss_made_outside_is_not_scaled_down(already_unscaled: bool, tmp_path: Path) -> None:
    model, inputs = model_of("bert").train(), ZOO["bert"].inputs()
    expected = regulariser_gradients(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    loss = nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([0, 1]))
    scaler.scale(loss).backward()
    if already_unscaled:
        scaler.unscale_(inner)
    arguments: Any = (TrainingArguments(str(tmp_path), use_cpu=True), None, None)
    LoRA2Callback().on_pre_optimizer_step(*arguments, model=model, optimizer=optimizer)
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        assert_sums_agree(parameters[name].grad, gradient, 2 * WIDTH, depth=4)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with the model's vocabulary."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return word_tokenizer((f"w{i}" for i in range(96)), **special)


def test_trl_regularises_and_prunes_by_itself(tmp_path: Path) -> None:
    """TRL makes its loss from the log-probabilities that the model returns, and leaves the model's loss aside."""
    trl = pytest.importorskip("trl")
    ids = torch.randint(5, 100, (16, 9), generator=torch.Generator().manual_seed(0)).tolist()
    config = LoRA2Config(r=4, target_rank=1, mask_interval=1, target_modules=ZOO["llama"].targets)
    settings = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-2}
    arguments = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "gradient_accumulation_steps": 2}
    run = trl.SFTTrainer(
        ZOO["llama"].build(),
        args=trl.SFTConfig(str(tmp_path), **settings, **arguments, per_device_train_batch_size=2),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=config,
        processing_class=words(),
    )
    expected, seen = regulariser_gradients(run.model), Gradients()
    run.add_callback(seen)
    run.train()
    for name, gradient in expected.items():
        assert_sums_agree(seen.steps[0][name], gradient, 2 * WIDTH, depth=4)
    assert sum(run.model.base_model.ranks().values()) == 8
    assert len([line for line in run.state.log_history if "orthogonality" in line]) == 6


def test_export_of_a_trained_adapter_is_exact(tmp_path: Path) -> None:
    model = model_of("bert", target_modules=["query", "value", "intermediate.dense"])
    trainer(model, "bert", tmp_path, max_steps=8).train()
    inputs = ZOO["bert"].inputs()
    expected = logits(model.eval(), inputs)
    for name in ("whole", "compact"):
        exported = export_model(model, tmp_path / name)
        assert exported.rank == 3
        plain = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path / name)).eval()
        assert type(plain.peft_config["default"]).__name__ == "LoraConfig"
        assert_models_agree(logits(plain, inputs), expected)
        if name == "whole":
            model.base_model.compact()


def _one_process(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # accelerate wants them said
    torch.set_num_threads(1)
    # They meet in a file: a port that was free a moment ago may be another test's by now.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = model_of("llama", initial_warmup=1, final_warmup=2)
    expected = regulariser_gradients(model)
    seen = Gradients()
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = trainer(model, "llama", Path(folder), ddp_backend="gloo", **arguments)
    run.add_callback(seen)
    run.train()
    for name, gradient in expected.items():
        assert_sums_agree(seen.steps[0][name], gradient, 2 * WIDTH, depth=4)
    state = {f"mask.{path}": layer.masks["default"] for path, layer in adapted(model, "default").items()}
    state |= {n: p.detach() for n, p in model.named_parameters() if "lora2_" in n}
    torch.save(state, Path(folder) / f"rank{rank}.pt")


def test_two_processes_prune_the_same(tmp_path: Path, fresh: Fresh) -> None:
    fresh.run_two(_one_process, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert sum(int(mask.sum()) for name, mask in first.items() if name.startswith("mask.")) == 16


def test_only_models_within_the_budget_compete_for_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("bert", initial_warmup=1, final_warmup=3)
    falling = iter(range(0, -99, -1))
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    settings = {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report_to": [], "seed": 3}
    run = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=6, **settings, **every_step, **best),
        train_dataset=examples("bert"),
        eval_dataset=examples("bert", 4),
        compute_metrics=lambda _: {"score": float(next(falling))},
    )
    run.train()
    # The score falls from the first step on, and steps 1 and 2 hold more than the mask of step 3.
    assert run.state.best_global_step == 3
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-3")
    assert "best model is chosen from here on" in caplog.text
    ranks = model.base_model.ranks()
    assert sum(ranks.values()) == 2 * len(ranks)
    first = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path / "checkpoint-2"))
    assert sum(first.base_model.ranks().values()) > 2 * len(ranks)


def test_a_run_that_ends_before_the_final_mask_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    run = trainer(model_of("bert", initial_warmup=1, final_warmup=3), "bert", tmp_path, max_steps=6)
    run.add_callback(Stop())
    run.train()
    assert "training ended at step 2, before the mask of adapter 'default' is final (step 3)" in caplog.text


def test_an_adapter_that_learned_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(ZOO["bert"].build(), LoRA2Config(r=4, target_modules=ZOO["bert"].targets)).train()
    state = TrainerState(global_step=1, max_steps=1)
    LoRA2Callback().on_train_end(None, state, None, model=model)
    assert "after step 1 every direction of adapter 'default' still has E = 0" in caplog.text
