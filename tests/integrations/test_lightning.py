"""Lightning's Trainer: the lifecycle's steps, a checkpoint, and a resumed run that is the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from zoo import ZOO

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ziggurat import ASLoRAConfig, LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.errors import ConfigError
from ziggurat.integrations.lightning import ZigguratCallback

TARGETS = ["q_proj", "v_proj"]
#: Optimiser steps of an epoch; a run has two epochs, since Lightning begins an epoch's data anew when it resumes.
STEPS = 6
CONFIGS: dict[str, Any] = {
    "msplora": lambda: MSPLoraConfig(r=4, target_modules=TARGETS, train_in_stages=True, init_weights=False),
    "lora2": lambda: LoRA2Config(
        r=4, target_rank=1, initial_warmup=2, final_warmup=3, mask_interval=2, target_modules=TARGETS
    ),
    "lor2c": lambda: LoR2CConfig(r=4, merges=1, injections=1, init_weights=False),
    "aslora": lambda: ASLoRAConfig(r=4, groups=2, target_modules=TARGETS, init_weights=False),
}


class Module(LightningModule):
    def __init__(self, method: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = get_peft_model(ZOO["llama"].build(), CONFIGS[method]())  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def run(method: str, folder: Path, resume: Path | None = None, **fields: Any) -> Module:
    """Two batches a step."""
    module = Module(method)
    torch.manual_seed(1)
    batches = [torch.randint(5, 100, (2, 6), generator=torch.Generator().manual_seed(n)) for n in range(2 * STEPS)]
    keeps = ModelCheckpoint(dirpath=folder, save_top_k=-1, save_on_train_epoch_end=True, filename="{epoch}")
    trainer = Trainer(
        **{"max_epochs": 2, "callbacks": [ZigguratCallback(), keeps], **fields},
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("method", CONFIGS)
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    whole = run(method, tmp_path / "whole").state_dict()
    resumed = run(method, tmp_path / "resumed", tmp_path / "whole" / "epoch=0.ckpt").state_dict()
    assert whole.keys() == resumed.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])] == []


def test_the_steps_are_made(tmp_path: Path) -> None:
    pruned = run("lora2", tmp_path / "lora2").model
    assert sum(pruned.base_model.ranks().values()) == len(TARGETS) * ZOO["llama"].build().config.num_hidden_layers  # type: ignore[union-attr, operator]
    assert run("aslora", tmp_path / "aslora").model.peft_config["default"].structure  # type: ignore[union-attr]


def test_a_run_without_an_end_and_a_model_without_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no end"):
        run("msplora", tmp_path, max_epochs=-1, max_time="00:00:00:01")

    class Bare(Module):
        def __init__(self) -> None:
            LightningModule.__init__(self)
            self.model = ZOO["llama"].build()

    with pytest.raises(ConfigError, match="Bare holds 0 models"):
        ZigguratCallback().on_train_start(Trainer(accelerator="cpu", logger=False), Bare())
