"""A small Llama with a real tokenizer, adapters trained on it, their exports, and what Ziggurat computes with them.

Sizes are the smallest that servers take: vLLM's attention on a CPU asks for heads of 32, llama.cpp's tokenizer for
all bytes.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from ziggurat import DyLoRAConfig, LoRA2Config, MSPLoraConfig
from ziggurat.export import export, merge

VOCABULARY = 300
QUERIES = ["q_proj", "v_proj"]
LINEARS = [*QUERIES, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = ["a ladder of small matrices shared by many layers", "two nested planes, the inner one pruned in training"]
#: Prompts of token ids, the longest one more than a block of vLLM's keys and values.
PROMPTS: list[list[int]] = [
    torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 150)
]
#: How many tokens follow a prompt, one by one.
STEPS = 8
MERGED = ("msplora_everywhere", "lora2_everywhere")


def configs() -> dict[str, PeftConfig]:
    """By name. What they become in an export differs: ranks, scales folded in, linears that pruning emptied."""
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    return {
        "msplora": MSPLoraConfig(r=4, target_modules=QUERIES, **task),
        "msplora_everywhere": MSPLoraConfig(r=8, target_modules=LINEARS, use_rslora=True, **task),
        "lora2": LoRA2Config(r=4, target_modules=QUERIES, **task),
        "lora2_everywhere": LoRA2Config(r=4, target_rank=1, target_modules=LINEARS, **task),
        "dylora": DyLoRAConfig(r=4, inference_rank=3, target_modules=LINEARS, **task),
    }


def save_base(folder: Path) -> None:
    """Grouped keys, so that their rows are fewer; weights so large that logits spread over several units."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(TEXTS),
        model_writer=written,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    LlamaTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))


def trained(base: Path, config: PeftConfig, steps: int = 30) -> PeftModel:
    """The base with an adapter that has learnt to say one text of random tokens; LoRA² prunes meanwhile."""
    torch.manual_seed(1)
    model: Any = get_peft_model(LlamaForCausalLM.from_pretrained(str(base)), config).train()
    text = torch.randint(3, VOCABULARY, (4, 24))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "prune"):
            model.base_model.prune(step, steps)
        optimizer.zero_grad()
    if hasattr(model.base_model, "compact"):
        model.base_model.compact()
    return model.eval()


@dataclass
class Spoken:
    """A prompt with what a model says to it, `ids`, and its logits after every one of them (tokens, vocabulary)."""

    prompt: int
    ids: list[int]
    logits: Tensor


@torch.no_grad()
def spoken(model: Any) -> list[Spoken]:
    """Every prompt with the STEPS tokens that `model` likes best after it, and its float32 logits."""
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(STEPS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(Spoken(len(prompt), ids, model(input_ids=torch.tensor([ids])).logits[0]))
    return answers


@dataclass
class Served:
    """Folders of the base, and by adapter of exports and merged models; the exports' ranks.

    `expected`: what Ziggurat's unmerged float32 model says, by adapter, and the base as "base".
    """

    base: Path
    exports: dict[str, Path]
    merged: dict[str, Path]
    ranks: dict[str, int]
    expected: dict[str, list[Spoken]]


def build(folder: Path) -> Served:
    """All of it below `folder`."""
    base = folder / "base"
    save_base(base)
    served = Served(base, {}, {}, {}, {"base": spoken(LlamaForCausalLM.from_pretrained(str(base)).eval())})
    for name, config in configs().items():
        model = trained(base, config)
        served.expected[name] = spoken(model)
        model.save_pretrained(str(folder / name))
        written = export(folder / name, folder / f"{name}.export", serving=True)
        served.exports[name], served.ranks[name] = written.folder, written.rank
    for name in MERGED:
        served.merged[name] = merge(folder / name, folder / f"{name}.merged")
    return served
