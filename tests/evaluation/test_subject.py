"""The arguments of `ziggurat eval`: adapters, and models without one; checks before any weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from commands import main
from ziggurat.errors import ConfigError, RecipeError
from ziggurat.evaluation.lm import evaluate
from ziggurat.evaluation.subject import check_tasks, find_subject, load_subject

pytest.importorskip("lm_eval")


def test_a_model_without_adapter(llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert main("eval", str(llama), "--tasks", "mmlu,drop", "--data", str(data), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    tokenizer = AutoTokenizer.from_pretrained(str(llama))
    mmlu, drop = evaluate(AutoModelForCausalLM.from_pretrained(str(llama)), tokenizer, ["mmlu", "drop"], data=data)
    assert written["model"] == str(llama) and "adapter" not in written
    assert written["scores"] == {"mmlu": {**mmlu.scores, "rows": 16}, "drop": {**drop.scores, "rows": 6}}
    assert written["per_cent"] == {"mmlu": ["acc"], "drop": ["em", "f1"]}
    assert f"{llama}: a model without adapter" in printed and f"mmlu: acc {mmlu.scores['acc']:.2f} ± " in printed


def test_what_stands_where(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_subject(llama).kind == "base"
    (tmp_path / "quantised").mkdir()
    file = tmp_path / "quantised" / "model.gguf"
    file.write_bytes(b"GGUF")
    assert find_subject(file.parent).kind == "base"
    named = find_subject(file)
    assert (named.kind, named.model, named.gguf_file) == ("base", str(file.parent), "model.gguf")
    monkeypatch.chdir(tmp_path)
    assert find_subject("some-one/some-model").kind == find_subject("gpt2").kind == "base"
    # A word that fits a folder here is a folder's.
    with pytest.raises(ConfigError, match=r"there is no folder quantised/model\."):
        find_subject("quantised/model")
    with pytest.raises(ConfigError, match="there is no folder"):
        find_subject(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        find_subject(tmp_path / "empty")
    with pytest.raises(RecipeError, match="'some-one/some-model' cannot be loaded"):
        load_subject(find_subject("some-one/some-model"))


def test_models_that_write_no_text(llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_bert))
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_bert))
    with pytest.raises(RecipeError, match="this model gives no text"):
        evaluate(model, tokenizer, ["mmlu"])
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(RecipeError, match=r"mmlu, drop: .* is an adapter for SEQ_CLS"):
        check_tasks(find_subject(tmp_path / "adapter"), ["mmlu", "drop"])
    with pytest.raises(RecipeError, match=r"mmlu: tasks of lm-eval need a language model; .* is a Bert"):
        check_tasks(find_subject(tiny_bert), ["mmlu"])
    with pytest.raises(RecipeError, match=r"glue/rte is answered by a trained head; .* is a model without adapter"):
        check_tasks(find_subject(llama), ["glue/rte"])
    check_tasks(find_subject(llama), ["mmlu"])


def test_all_is_seen_to_before_weights_are_loaded(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for file in llama.glob("*.json"):
        shutil.copy(file, hollow)  # no weights: loading them is the last complaint

    def complaint(*more: str) -> str:
        assert main("eval", str(hollow), *more) == 2
        return capsys.readouterr().err

    assert "say --run-generated-code" in complaint("--tasks", "humaneval", "--data", str(data))
    assert "--data: " in complaint("--tasks", "mmlu", "--data", str(tmp_path / "none"))
    (tmp_path / "drop").mkdir()
    assert "test.parquet" in complaint("--tasks", "mmlu", "--data", str(tmp_path))
    assert "--limit" in complaint("--tasks", "mmlu", "--limit", "0")
    assert "cannot be loaded" in complaint("--tasks", "mmlu", "--data", str(data))
