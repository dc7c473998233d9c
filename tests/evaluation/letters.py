"""A tiny Llama that knows the letters of the choices, and the four tasks' local files for it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.utils.collect_env
from training_tables import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from word_tokenizer import word_tokenizer

# lm-eval describes the machine beside each score, for two seconds, and nobody here reads it.
torch.utils.collect_env.get_pretty_env_info = lambda: "left out"

WORDS = [*"ABCD012", "one", "two", "is", "the", "sum", "what", "answer", "so", *"Q:.?"]


def save_llama(folder: Path) -> Path:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    word_tokenizer(WORDS, **special).save_pretrained(str(folder))
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(WORDS) + 4, "num_hidden_layers": 2, "intermediate_size": 32}
    sizes["max_position_embeddings"] = 2048
    config = LlamaConfig(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3, initializer_range=0.5)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_tasks_data(folder: Path) -> Path:
    def questions(subject: str, count: int) -> list[dict[str, Any]]:
        return [
            {
                "subject": subject,
                "question": f"what is the sum {WORDS[4 + index % 5]} {WORDS[4 + index % 3]} ?",
                "choices": ["one", "two", "0", "1"],
                "answer": (0, 1, 1, 2, 2, 2, 2, 3)[index % 8],
            }
            for index in range(count)
        ]

    subjects = ("hard_sums", "sums")
    write(folder / "mmlu" / "test.parquet", [row for name in subjects for row in questions(name, 8)])
    write(folder / "mmlu" / "dev.parquet", [row for name in subjects for row in questions(name, 5)])
    inputs = [{"task": "count", "input": f"the {word} {{%", "target": "one"} for word in WORDS[4:9]]
    write(folder / "bbh" / "test.parquet", inputs)
    prompt = "canary\n-----\nCount {{ braces }}.\n\nQ: the sum\nA: Let's think step by step.\nSo the answer is one."
    write(folder / "bbh" / "cot_prompts.parquet", [{"task": "count", "prompt": prompt}])
    passages = [
        {"passage": f"the sum is {word} .", "question": "what is the sum ?", "answers": [word, "0"]}
        for word in ("one", "two", "1", "2", "0", "A")
    ]
    write(folder / "drop" / "validation.parquet", passages)
    programs = [
        {
            "task_id": f"HumanEval/{index}",
            "prompt": f"def f{index}():\n    return {index}\n",
            "entry_point": f"f{index}",
            "test": f"def check(f):\n    assert f() == {index if index else 7}\n",
        }
        for index in range(2)
    ]
    write(folder / "humaneval" / "test.parquet", programs)
    return folder
