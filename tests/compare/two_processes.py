"""The program of each of two gloo processes in `test_two_processes`: train all cases under DDP and FSDP2, and save."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from moe_models import EXPERTS, mixture
from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig, plain_lora, share
from ziggurat.errors import ConfigError
from zoo import ZOO

TARGETS = ["q_proj", "v_proj"]
METHODS: dict[str, Any] = {
    "msplora": lambda: MSPLoraConfig(r=4, target_modules=TARGETS, init_weights=False),
    "lor2c": lambda: LoR2CConfig(r=4, init_weights=False),
    "lora2": lambda: LoRA2Config(r=4, target_rank=4, target_modules=TARGETS, init_weights=False),
    "experts": lambda: MSPLoraConfig(
        r=4, target_modules=TARGETS, target_parameters=[*EXPERTS, "gate.weight"], init_weights=False
    ),
}
#: The adapters of a set, one for each text of a batch. Under DDP the second process has no text of the first adapter.
NAMES = {"ddp": ["films", "books", "books", "books"], "fsdp2": ["films", "books", "films", "books"]}
CASES = (*METHODS, "set")
STRATEGIES = ("ddp", "fsdp2")
STEPS = 3
#: Of what goes to a server as plain LoRA.
PLAIN_RANK = 16


def base(case: str) -> Any:
    return mixture("qwen3_moe", vocab_size=100) if case == "experts" else ZOO["llama"].build()


def build(case: str) -> PeftModel:
    torch.manual_seed(0)
    if case != "set":
        return get_peft_model(base(case), METHODS[case]()).train()
    model = get_peft_model(base(case), METHODS["msplora"](), "films")
    model.add_adapter("books", METHODS["msplora"]())
    share(model, ["films", "books"])
    return model.train()


def batch(step: int) -> Tensor:
    """Four texts of one length, so that the mean over all is the mean of the two halves' means."""
    return torch.randint(5, 100, (4, 6), generator=torch.Generator().manual_seed(step))


def steps(model: nn.Module, rows: slice, case: str, strategy: str) -> list[float]:
    names = {"adapter_names": NAMES[strategy][rows]} if case == "set" else {}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for step in range(STEPS):
        ids = batch(step)[rows]
        loss = model(input_ids=ids, labels=ids, **names).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def sharded(model: PeftModel) -> PeftModel:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def work(rank: int, out: str) -> None:
    """Train all, and have rank 0 write the adapters and the losses, averaged over the ranks."""
    torch.set_num_threads(1)
    # They meet in a file: a port that was free a moment ago may be another test's by now.
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    measured: dict[str, list[float]] = {}
    for case in CASES:
        for strategy in STRATEGIES:
            model = build(case)
            whole: Any = (
                sharded(model)
                if strategy == "fsdp2"
                else DistributedDataParallel(model, find_unused_parameters=case == "set")
            )
            losses = torch.tensor(steps(whole, slice(2 * rank, 2 * rank + 2), case, strategy))
            dist.all_reduce(losses)
            measured[f"{case}-{strategy}"] = (losses / 2).tolist()
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(model, options=options) if strategy == "fsdp2" else model.state_dict()
            if strategy == "fsdp2" and case not in ("lor2c", "set"):
                plain = plain_lora(model, rank=PLAIN_RANK)
                if rank == 0:
                    save_file(plain.tensors, Path(out) / f"{case}-plain.safetensors")
            if rank == 0:
                model.save_pretrained(str(Path(out) / f"{case}-{strategy}"), state_dict=state)
            dist.barrier()
    answers = tensor_parallel(rank, out) | {"set": without_a_sample(model, batch(0)[:2])}
    if rank == 0:
        (Path(out) / "losses.json").write_text(json.dumps(measured))
        (Path(out) / "answers.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def without_a_sample(model: nn.Module, ids: Tensor) -> str:
    """What a model that FSDP2 has sharded says to a batch without a sample of one adapter of its set."""
    try:
        model(input_ids=ids, adapter_names=["books", "books"])
    except ValueError as error:
        return str(error)
    return "nothing"


def tensor_parallel(rank: int, out: str) -> dict[str, Any]:
    """What each method says of a base that transformers has split over the processes; of LoR2C the logits."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    if rank == 0:
        config: Any = ZOO["llama"].build().config
        config.num_key_value_heads = config.num_attention_heads  # heads are what is split
        AutoModelForCausalLM.from_config(config).save_pretrained(Path(out) / "llama")
    dist.barrier()
    answers: dict[str, Any] = {}
    for method in ("msplora", "lora2", "lor2c"):
        split = AutoModelForCausalLM.from_pretrained(Path(out) / "llama", tp_plan="auto")
        try:
            answers[method] = first_logits(split, METHODS[method]()).tolist()
        except ConfigError as error:
            answers[method] = str(error)
    return answers


def first_logits(model: nn.Module, config: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return get_peft_model(model, config).eval()(input_ids=batch(0)).logits  # type: ignore[arg-type]
