"""Tiny models with their own tokenizers, and small tables to learn from."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from word_tokenizer import word_tokenizer

if TYPE_CHECKING:
    from ziggurat.recipe.schema import Recipe

WORDS = [
    *("the", "a", "film", "story", "actor", "scene", "music", "plot", "is", "was", "and", "not", "very"),
    *("good", "great", "fine", "lovely", "bad", "poor", "dull", "awful"),
    *("what", "colour", "sky", "grass", "blue", "green", "say", "name", "one", "two", "three", "yes", "no"),
]


#: Sizes of the tiny models.
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + 5,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def _save_tokenizer(folder: Path, chat: bool) -> None:
    from tokenizers import processors

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = word_tokenizer(WORDS, **special, eos_token="</s>")
    fast.model_max_length = 64
    if not chat:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        fast.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(str(folder))


def save_still_bert(folder: Path) -> None:
    """`save_tiny_bert` without dropout, so that its run doesn't depend on who draws which numbers."""
    save_tiny_bert(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def save_tiny_bert(folder: Path, **config_fields: Any) -> None:
    """An untrained BERT of four layers, saved without a head: as published encoders are."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, **config_fields)).save_pretrained(str(folder))
    _save_tokenizer(folder, chat=False)


def save_tiny_llama(folder: Path) -> None:
    """An untrained Llama of four layers whose tokenizer has a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=4,
        initializer_range=0.3,  # the frozen output layer must be able to prefer one word
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    _save_tokenizer(folder, chat=True)


def save_tiny_t5(folder: Path) -> None:
    """An untrained T5 of two layers a side, whose tokenizer ends texts as T5's does."""
    from tokenizers import processors
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS) + 5,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=4,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(str(folder))
    _save_tokenizer(folder, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 4)]
    )
    tokenizer.save_pretrained(str(folder))


def notes_of(examples: Any) -> list[str]:
    """The notes of examples whose validation file is the training file, but the one that says so."""
    return [note for note in examples.notes if " validation rows are training rows, too" not in note]


def reviews(count: int) -> list[dict[str, str]]:
    """Sentences whose class one word decides, so that a few steps learn them."""
    good, bad, nouns = ["good", "great", "fine", "lovely"], ["bad", "poor", "dull", "awful"], WORDS[2:8]
    rows = []
    for index in range(count):
        words, label = (good, "pos") if index % 2 == 0 else (bad, "neg")
        rows.append({"text": f"the {nouns[index % 6]} is very {words[(index // 2) % 4]}", "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def tiny_recipe(model: Path, data: Path, output: Path, **more: Any) -> "Recipe":
    """A short MSPLoRA run; `more` sets keys (`train__lr` is `train.lr`), and None leaves one out."""
    from ziggurat.recipe.recipe import make_recipe

    values = {
        "name": "tiny",
        "model": str(model),
        "data.train": str(data),
        "data.validation_rows": 8,
        "method.name": "msplora",
        "method.r": 4,
        "train.lr": 3.0e-2,
        "train.epochs": 5,
        "train.batch": 8,
        "train.evaluate": "never",
        "train.save": "never",
        "output": str(output),
    }
    values.update({key.replace("__", "."): value for key, value in more.items()})
    return make_recipe({key: value for key, value in values.items() if value is not None})
