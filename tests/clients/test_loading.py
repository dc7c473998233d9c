"""Programs that load adapters by PEFT take a folder as it was saved, without an import. `.ci/clients` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_tables import save_tiny_llama

from ziggurat import MSPLoraConfig
from ziggurat.export import export

CLIENT = os.environ.get("ZIGGURAT_CLIENT")
TASK: dict[str, Any] = {
    "task": "film",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": [" good", " bad", " very"],
    "doc_to_target": 0,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, an adapter that changes it, and the adapter's export."""
    save_tiny_llama(tmp_path / "llama")
    torch.manual_seed(1)
    config = MSPLoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_weights=False)
    config.task_type = "CAUSAL_LM"  # type: ignore[assignment]
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "llama"))
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    export(tmp_path / "adapter", tmp_path / "plain")
    return tmp_path


def run(place: Path, *words: str) -> None:
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.skipif(CLIENT != "lm_eval", reason="no lm-eval of its own: .ci/clients")
def test_lm_eval_scores_a_folder_as_its_export(place: Path) -> None:
    (place / "film.yaml").write_text(yaml.safe_dump(TASK))
    texts = ["the film is", "the story was not", "a dull plot is", "the music was very"] * 3
    (place / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    scores = {}
    for name, peft in {"base": "", "adapter": ",peft=adapter", "plain": ",peft=plain"}.items():
        words = f"--model hf --model_args pretrained=llama,dtype=float32{peft} --tasks film --include_path ."
        words += f" --device cpu --log_samples --output_path {name}-out"
        run(place, "lm_eval", *words.split())
        lines = next((place / f"{name}-out").rglob("samples_*.jsonl")).read_text().splitlines()
        scores[name] = [float(answer[0][0]) for line in lines for answer in json.loads(line)["resps"]]
    assert scores["adapter"] == pytest.approx(scores["plain"], abs=1e-4)
    assert len(scores["base"]) == 36
    assert max(abs(a - b) for a, b in zip(scores["base"], scores["adapter"])) > 0.1


@pytest.mark.skipif(CLIENT != "mergekit", reason="no mergekit of its own: .ci/clients")
def test_mergekit_merges_base_and_adapter(place: Path) -> None:
    """`base+adapter`, averaged with the base: half of the update."""
    half = {"parameters": {"weight": 0.5}}
    models = [{"model": f"{place}/llama+{place}/adapter", **half}, {"model": f"{place}/llama", **half}]
    config = {"models": models, "merge_method": "linear", "dtype": "float32"}
    (place / "merge.yaml").write_text(yaml.safe_dump(config))
    run(place, "mergekit-yaml", "merge.yaml", "merged", "--lora-merge-cache", "cache")
    base = AutoModelForCausalLM.from_pretrained(str(place / "llama"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    whole = PeftModel.from_pretrained(base, str(place / "adapter")).merge_and_unload().state_dict()
    merged = load_file(next((place / "merged").glob("*.safetensors")))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (whole[name] - before[name]).abs().max() > 1e-2
    torch.testing.assert_close(merged[name], (whole[name] + before[name]) / 2)
    assert AutoTokenizer.from_pretrained(str(place / "merged")).vocab_size > 0
