"""The configs for PEFT's own benchmark load, and train as many parameters as their README says."""

import re
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import LlamaConfig, LlamaForCausalLM

from ziggurat.host.count import count

PLACE = Path(__file__).parents[1] / "benchmarks" / "method_comparison"


def test_the_experiments_train_what_the_readme_says() -> None:
    rows = re.findall(r"^\| (\S+/\S+) \| ([\d,]+) \|", (PLACE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    parameters = {name: int(number.replace(",", "")) for name, number in rows}
    folders = {file.parent for file in PLACE.glob("experiments/*/*/adapter_config.json")}
    assert parameters.keys() == {str(folder.relative_to(PLACE / "experiments")) for folder in folders}
    shapes = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(shapes)
    for name, number in parameters.items():
        assert count(llama, PeftConfig.from_pretrained(str(PLACE / "experiments" / name))) == number, name
