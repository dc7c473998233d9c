"""The program of each of two gloo processes in `test_sharded`: DeepSpeed's ZeRO, FSDP1, 4-bit weights under FSDP2."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))
import two_processes
from two_processes import STEPS, batch, sharded

from ziggurat.errors import ConfigError
from zoo import ZOO

METHODS = {name: two_processes.METHODS[name] for name in ("msplora", "lor2c", "lora2")}
#: LoRA²'s regulariser reads the factors outside of the layers that FSDP1 gathers.
FSDP1 = ("msplora", "lor2c")
ZERO = {"zero2": 2, "zero3": 3}


def in_four_bits(folder: str) -> nn.Module:
    """The Llama in `folder`, as transformers loads it for QLoRA under FSDP: its storage is of the factors' dtype."""
    kinds: Any = {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kinds)
    return AutoModelForCausalLM.from_pretrained(f"{folder}/llama", quantization_config=config, device_map="cpu")


def adapted(base: nn.Module, method: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, METHODS[method]()).train()  # type: ignore[arg-type]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)


def steps(model: nn.Module, rows: slice) -> list[float]:
    """The losses of each step in a loop of one's own."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        ids = batch(step)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def qlora(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method in METHODS:
        model = sharded(adapted(in_four_bits(folder), method))
        losses = steps(model, slice(2 * rank, 2 * rank + 2))
        write(rank, folder, method, losses, {n: p.full_tensor() for n, p in trained_parameters(model).items()})  # type: ignore[attr-defined]
    dist.destroy_process_group()


def zero(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    import deepspeed  # pyright: ignore[reportMissingImports]

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for method in METHODS:
        for way, stage in ZERO.items():
            model = adapted(ZOO["llama"].build(), method)  # type: ignore[arg-type]
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer_of(model),
                config={
                    "train_micro_batch_size_per_gpu": 2,
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                },
            )
            losses = []
            for step in range(STEPS):
                ids = batch(step)[2 * rank : 2 * rank + 2]
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                losses.append(float(loss.detach()))
            with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                tensors = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
            write(rank, folder, f"{method}-{way}", losses, tensors)
    dist.destroy_process_group()


def write(rank: int, folder: str, name: str, losses: list[float], tensors: dict[str, Tensor]) -> None:
    """Rank 0 writes what was trained, and the losses averaged over the ranks."""
    total = torch.tensor(losses)
    dist.all_reduce(total)
    if rank == 0:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, f"{folder}/{name}.safetensors")
        Path(f"{folder}/{name}.json").write_text(json.dumps((total / 2).tolist()))
    dist.barrier()


def flattened(method: str) -> FullyShardedDataParallel:
    base: Any = ZOO["llama"].build()
    words: Any = {"use_orig_params": True, "device_id": torch.device("cpu")}
    policy = ModuleWrapPolicy({type(base.model.layers[0])})
    return FullyShardedDataParallel(adapted(base, method), auto_wrap_policy=policy, **words)


def fsdp1(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method in FSDP1:
        model = flattened(method)
        losses = steps(model, slice(2 * rank, 2 * rank + 2))
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            parts = ("_fsdp_wrapped_module.", "")
            tensors = {n.replace(*parts): p.detach().clone() for n, p in trained_parameters(model).items()}
        write(rank, folder, method, losses, tensors)
    with pytest.raises(ConfigError, match="use FSDP2"):
        steps(flattened("lora2"), slice(2 * rank, 2 * rank + 2))
    dist.destroy_process_group()
