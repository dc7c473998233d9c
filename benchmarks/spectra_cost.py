"""What `spectra: epoch` costs on RoBERTa-base's shapes: one record beside one epoch, in processor seconds.

    python benchmarks/spectra_cost.py                 # about 3 minutes of one core

RoBERTa-base from its config, weights random (nothing here depends on their values), query and value adapted, batches of
16 x 64 tokens. A record is what the callback does at the end of an epoch: collect the stored parts and make the logged
numbers of them. A step is forward, backward, AdamW. Medians of processor time, one thread, so that other work on the
machine counts little. The smallest epoch that keeps a record below 1% follows.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import ziggurat
from ziggurat.analysis import collect
from ziggurat.analysis.trace import scalars

QUERY_VALUE = ["query", "value"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "MSPLoRA 8, 4, 2": lambda: ziggurat.MSPLoraConfig(r=8, target_modules=QUERY_VALUE, init_weights=False),
    "MSPLoRA 32, 32, 32": lambda: ziggurat.MSPLoraConfig(
        ranks=[32] * 3, target_modules=QUERY_VALUE, init_weights=False
    ),
    "LoRA² k 8, r 8": lambda: ziggurat.LoRA2Config(r=8, target_modules=QUERY_VALUE, init_weights=False),
    "LoR2C r 8": lambda: ziggurat.LoR2CConfig(r=8, init_weights=False),
    "LoRA r 8": lambda: peft.LoraConfig(r=8, target_modules=QUERY_VALUE, init_lora_weights=False),
    "AdaLoRA r 12": lambda: peft.AdaLoraConfig(
        init_r=12, target_r=8, total_step=1000, target_modules=QUERY_VALUE, init_lora_weights=False
    ),
}


def seconds(work: Callable[[], object], times: int) -> float:
    """Median processor time of one call, the first not counted."""
    seconds = []
    for _ in range(times + 1):
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--records", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    ids = torch.randint(5, 50000, (options.batch, options.length))
    labels = torch.randint(0, 2, (options.batch,))
    print("| adapter | one record, s | one step, s | a record in steps | below 1% from an epoch of |")
    print("|---|--:|--:|--:|--:|")
    for name, config in ADAPTERS.items():
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(RobertaForSequenceClassification(base), config())
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-4)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        a_step = seconds(step, options.steps)
        record = seconds(lambda model=model: scalars(collect(model, composed=False)), options.records)
        share = record / a_step
        print(
            f"| {name} | {record:.3f} | {a_step:.2f} | {share:.3f} | {-(-100 * record // a_step):.0f} steps |",
            flush=True,
        )


if __name__ == "__main__":
    main()
