"""Tiers trained one after the other, by the Trainer itself and by hand."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from ziggurat import MSPLoraConfig
from ziggurat.host.tensors import tier_of
from zoo import ZOO


def model_in_stages(train_in_stages: bool = True):
    torch.manual_seed(0)
    config = MSPLoraConfig(r=4, target_modules=["query"], train_in_stages=train_in_stages, init_weights=False)
    return get_peft_model(ZOO["bert"].build(), config)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.bank_msplora.factors("default").named_parameters()}


class Recorder(TrainerCallback):
    """Which tiers each step moved."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.before = snapshot(model)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        after = snapshot(model)
        self.moved.append({tier_of(n) for n, p in after.items() if not torch.equal(p, self.before[n])})


def rows() -> Dataset:
    ids = torch.randint(5, 100, (24, 7), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def test_all_tiers_learn_where_no_stages_are_asked_for(tmp_path: Path) -> None:
    """Also in a process where an adapter in stages has been made, whose callback rides along ever since."""
    model_in_stages()
    model, recorder = model_in_stages(train_in_stages=False), Recorder()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows(), callbacks=[recorder]).train()
    assert recorder.moved == [{"global", "mid", "layer"}] * 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_trainer_moves_one_tier_at_a_time(tmp_path: Path, resume: bool) -> None:
    data = rows()

    def run(folder: Path) -> tuple[Trainer, Recorder]:
        recorder = Recorder()
        arguments = TrainingArguments(
            str(folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model_in_stages(), arguments, train_dataset=data, callbacks=[recorder]), recorder

    trainer, recorder = run(tmp_path / "a")
    trainer.train()
    expected = [{"global"}, {"global"}, {"mid"}, {"mid"}, {"layer"}, {"layer"}]
    if resume:
        trainer, recorder = run(tmp_path / "b")
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        expected = expected[3:]
    assert recorder.moved == expected


def test_a_plain_loop_calls_one_method_a_step() -> None:
    model = model_in_stages()
    inputs = ZOO["bert"].inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    named = []
    for step in range(3):
        before = snapshot(model)
        named.append(model.set_stage(step / 3))
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {tier_of(n) for n, p in snapshot(model).items() if not torch.equal(p, before[n])}
        assert moved == {named[-1]}
    assert named == ["global", "mid", "layer"]
    model.end_stages()
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.bank_msplora.parameters())
    with pytest.raises(ValueError, match="does not exist"):
        model.set_stage(0.0, "nobody")
