"""Token-by-token generation by a 1B Llama: a static cache, batch 1 and 16, each step directly and from a CUDA graph.

    python -m benchmarks.gpu.decode --out DIR

The base's weights are bf16 and the factors float32, as PEFT makes them; "autocast" computes their products in bf16,
which the Triton kernels need. Rows hold microseconds a token and the median ratio to the base model.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from benchmarks.gpu.models import ALL, LLAMA_QV, llama
from benchmarks.gpu.profiles import profile
from benchmarks.gpu.rows import Rows, arguments
from benchmarks.gpu.timing import captured, in_turns, ratios
from benchmarks.paired import sharing
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import StaticCache

from ziggurat import MSPLoraConfig

PROMPT, ROUNDS = 128, 50
#: Places in the cache after the prompt. Every run takes one: rounds, warm-ups, captures, the profile.
ROOM = 2 * ROUNDS + 56
#: Seconds that one setting takes: none is begun with less time left.
ONE_SETTING = 12


class Decoder:
    """A model, its cache with a prompt in it, and the last token of each sequence; a call adds one token."""

    def __init__(self, model: nn.Module, sequences: int, prompt: int, autocast: bool) -> None:
        self.model, self.autocast = model.eval(), autocast
        self.device = next(model.parameters()).device
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + ROOM)
        self.places = torch.arange(prompt + ROOM, device=self.device)
        self.at = torch.tensor([prompt], device=self.device)
        torch.manual_seed(1)
        ids = torch.randint(5, 256, (sequences, prompt), device=self.device)
        self.token = self._next(ids, self.places[:prompt])

    def __call__(self) -> None:
        self.token.copy_(self._next(self.token, self.at))
        self.at.add_(1)

    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The most likely token after ids, which stand at positions; everything stays on the device."""
        seen = (self.places[None, :] <= positions[:, None]).expand(len(ids), 1, -1, -1)
        # A graph can't be captured around autocast's cache of converted weights.
        with torch.no_grad(), torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        ):  # fmt: skip
            out = self.model(
                input_ids=ids,
                attention_mask=seen,
                position_ids=positions[None, :],
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.logits[:, -1:].argmax(-1)


def models(base: nn.Module, targets: list[str]) -> dict[str, tuple[Callable[[], nn.Module], bool]]:
    """Name -> what makes the model, and whether it runs under autocast."""
    lora, ours = LoraConfig(r=8, target_modules=list(targets)), MSPLoraConfig(r=8, target_modules=list(targets))

    def merged() -> nn.Module:
        return get_peft_model(copy.deepcopy(base), ours).merge_and_unload()  # merging writes into the weights

    return {
        "base": (lambda: sharing(base), False),
        "MSPLoRA r 8": (lambda: get_peft_model(sharing(base), ours), False),
        "MSPLoRA r 8, autocast": (lambda: get_peft_model(sharing(base), ours), True),
        "MSPLoRA r 8, merged": (merged, False),
        "PEFT LoRA r 8": (lambda: get_peft_model(sharing(base), lora), False),
        "PEFT LoRA r 8, autocast": (lambda: get_peft_model(sharing(base), lora), True),
    }


def measure(rows: Rows, base: nn.Module, what: str, targets: list[str], sequences: int, small: bool) -> None:
    device = next(base.parameters()).device
    decoders: dict[str, Decoder] = {}
    for mode in ("direct", "graph"):
        table = f"decode, Llama 1B, {what}, batch {sequences}, {mode}"
        runs: dict[str, Callable[[], object]] = {}
        for name, (make, autocast) in models(base, targets).items():
            try:
                if name not in decoders:
                    decoders[name] = Decoder(make(), sequences, 8 if small else PROMPT, autocast)
                    for _ in range(1 if small else 5):
                        decoders[name]()
                runs[name] = captured(decoders[name], device) if mode == "graph" else decoders[name]
            except Exception as error:
                rows.failed(error, table=table, way=name)
        if "base" in runs:
            timed(rows, table, runs, device, 2 if small else ROUNDS)


def timed(rows: Rows, table: str, runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> None:
    """Rows of the runs; of the direct ones a profile of the slowest of ours too."""
    took = in_turns(runs, device, rounds=rounds, seconds=4.0)
    slowness = {}
    for name, times in took.items():
        ratio = ratios(times, took["base"])
        slowness[name] = ratio["ratio"]
        rows.add(table=table, way=name, us=statistics.median(times), **ratio, rounds=len(times))
    ours = [name for name in slowness if name.startswith("MSPLoRA")]
    if ours and table.endswith("direct"):
        slowest = max(ours, key=slowness.__getitem__)
        profile(rows, runs[slowest], device, table, slowest)


def main() -> int:
    given, rows = arguments("decode", __doc__)
    device = torch.device("cpu" if given.rehearse else "cuda")
    base = llama(2 if given.rehearse else 16, given.rehearse, device).requires_grad_(False)
    settings = [("q and v", LLAMA_QV, 1), ("all linear layers", ALL, 1), ("q and v", LLAMA_QV, 16)]
    settings += [("all linear layers", ALL, 16)]
    for setting in settings[:1] if given.rehearse else settings:
        if given.until - time.time() < ONE_SETTING:
            rows.failed("left out: no time", table=f"decode, {setting[0]}, batch {setting[2]}")
        else:
            measure(rows, base, *setting, small=given.rehearse)
    return int(rows.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
