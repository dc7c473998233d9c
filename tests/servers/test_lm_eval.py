"""The command `lm_eval`, as anybody installs it, scores an exported adapter as `ziggurat eval` scores the adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from word_tokenizer import word_tokenizer
from ziggurat import MSPLoraConfig, cli
from ziggurat.evaluation.local_tasks import PREFIX
from ziggurat.export import export

pytest.importorskip("lm_eval")
WORDS = ["A", "B", "C", "D", "one", "two", "three", "four", "what", "is", "the", "sum", "Answer", ":", ".", "?"]


def save_tiny_model(folder: Path) -> None:
    """A tiny Llama that knows the letters of the choices."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = word_tokenizer(WORDS, **special)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(str(folder))


def write_questions(folder: Path) -> None:
    rows = [
        {
            "subject": "sums",
            "question": f"what is the sum {WORDS[4 + index % 4]} {WORDS[4 + index // 4 % 4]} ?",
            "choices": ["one", "two", "three", "four"],
            "answer": index * 7 % 4,
        }
        for index in range(16)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:5]), folder / "dev.parquet")


def test_stock_lm_eval_gives_our_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, tasks = tmp_path / "base", tmp_path / "adapter", tmp_path / "tasks"
    save_tiny_model(base)
    write_questions(tmp_path / "data" / "mmlu")
    torch.manual_seed(1)
    config = MSPLoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_weights=False)
    config.task_type = "CAUSAL_LM"  # type: ignore[assignment]
    get_peft_model(AutoModelForCausalLM.from_pretrained(str(base)), config).save_pretrained(str(adapter))
    words = ["eval", str(adapter), "--tasks", "mmlu", "--data", str(tmp_path / "data"), "--keep-tasks", str(tasks)]
    monkeypatch.setattr(sys, "argv", ["ziggurat", *words, "--out", str(tmp_path / "ours.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    ours = json.loads((tmp_path / "ours.json").read_text())["scores"]["mmlu"]

    plain = export(adapter, tmp_path / "plain", serving=True).folder
    entry = Path(sys.executable).with_name("lm_eval")
    command = [str(entry)] if entry.exists() else [sys.executable, "-m", "lm_eval"]
    command += ["--model", "hf", "--model_args", f"pretrained={base},peft={plain},dtype=float32"]
    command += ["--tasks", f"{PREFIX}mmlu", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "8"]
    command += ["--output_path", str(tmp_path / "stock")]
    alone = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(next((tmp_path / "stock").rglob("results_*.json")).read_text())
    assert "ziggurat" not in json.dumps(content["config"]["model_args"]).replace(str(tmp_path), "")
    stock = {**content["results"], **content.get("groups", {})}[f"{PREFIX}mmlu"]
    assert ours["acc"] == pytest.approx(100 * stock["acc,none"])
    assert ours["rows"] == sum(part["effective"] for part in content["n-samples"].values()) == 16
