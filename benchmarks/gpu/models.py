"""The models of whole steps and of decoding: random weights in bfloat16, made on the device itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_QV, ROBERTA_QV = ["q_proj", "v_proj"], ["query", "value"]


class Shape(NamedTuple):
    """A model, what is adapted in it, and the batch; `small` makes the rehearsal's."""

    model: str
    make: Callable[[int, bool, torch.device], nn.Module]
    layers: int
    targets: list[str]
    batch: tuple[int, int]
    dropout: float = 0.05

    def small(self) -> "Shape":
        return self._replace(layers=2, batch=(2, 8))

    def named(self, layers: int) -> str:
        what = "all linear layers" if self.targets is ALL else "q and v"
        depth = f"{layers} layers" if layers == self.layers else f"{layers} of {self.layers} layers"
        return f"{self.model}, {depth}, {what}, batch {self.batch[0]} x {self.batch[1]}, dropout {self.dropout}"


def llama(layers: int, small: bool, device: torch.device) -> nn.Module:
    """Llama-3.2-1B's shapes with a vocabulary of 32,000 instead of 128,256: the adapters don't touch the logits."""
    config = LlamaConfig(
        vocab_size=256 if small else 32_000,
        hidden_size=64 if small else 2048,
        intermediate_size=96 if small else 8192,
        num_hidden_layers=layers,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def roberta(layers: int, small: bool, device: torch.device) -> nn.Module:
    """RoBERTa-base's shapes, with its own dropout of 0.1."""
    config = RobertaConfig(
        vocab_size=256 if small else 50_265,
        hidden_size=64 if small else 768,
        intermediate_size=96 if small else 3072,
        num_hidden_layers=layers,
        num_attention_heads=4 if small else 12,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    with device:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)


SHAPES = {
    "llama-qv": Shape("Llama 1B", llama, 16, LLAMA_QV, (4, 1024)),
    "roberta-qv": Shape("RoBERTa-base", roberta, 12, ROBERTA_QV, (32, 128)),
    "llama-all": Shape("Llama 1B", llama, 16, ALL, (4, 1024)),
}


def layers_of(base: nn.Module) -> nn.ModuleList:
    """The transformer layers of a model of `SHAPES`, with or without an adapter in it."""
    return next(module for module in base.modules() if isinstance(module, nn.ModuleList))


def batch(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(1)
    sequences, tokens = shape.batch
    ids = torch.randint(5, 256, (sequences, tokens), device=device)
    labels = ids if shape.make is llama else torch.arange(sequences, device=device) % 2
    return {"input_ids": ids, "labels": labels}
