"""What the README documents, on the embedded model and data, five steps long: train, resume, predict, export, merge,
eval, analyze, report, plan, doctor; TRL's SFT; transformers' add_adapter and load_adapter.

`.ci/versions` runs this file under every set of versions that is supported.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from commands import main
from methods_table import logits, zoo_config
from word_tokenizer import word_tokenizer
from ziggurat.errors import VersionError
from ziggurat.host.supported import required_peft
from zoo import ZOO

METHODS = ["msplora", "lora2", "lor2c"]
SHORT = ["data.max_train=80", "data.max_validation=16", "train.max_steps=5", "train.save=2", "train.evaluate=never"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main("train", *SHORT, f"output={out}") == 0
    return out


def test_train(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["steps"] == 5


def test_a_stopped_run_resumes_to_the_same_adapter(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ziggurat.training.loop import run as training

    def goes_away(*_: Any) -> None:
        raise OSError("the machine goes away")

    with monkeypatch.context() as broken:
        broken.setattr(training, "_final_scores", goes_away)
        assert main("train", *SHORT, f"output={tmp_path / 'out'}") != 0
    assert not (tmp_path / "out").exists()
    assert main("train", *SHORT, f"output={tmp_path / 'out'}", "resume=true") == 0
    first, second = (folder / "adapter_model.safetensors" for folder in (run, tmp_path / "out"))
    assert first.read_bytes() == second.read_bytes()


def test_predict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("predict", str(run), "a fine film", "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_export_and_merge(run: Path, tmp_path: Path) -> None:
    assert main("export", str(run), str(tmp_path / "plain")) == 0
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert main("merge", str(run), str(tmp_path / "whole")) == 0
    assert (tmp_path / "whole/model.safetensors").exists()


def test_eval(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "glue/sst2").mkdir(parents=True)
    rows = [{"sentence": f"a {word} film", "label": label} for label, word in ((0, "dull"), (1, "fine"))]
    Dataset.from_list(rows).to_parquet(tmp_path / "glue/sst2/validation.parquet")
    assert main("eval", str(run), "--tasks", "glue/sst2", "--data", str(tmp_path / "glue")) == 0
    assert "accuracy" in capsys.readouterr().out


def test_what_looks_at_an_adapter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("analyze", str(run), "--out", str(tmp_path / "analysis")) == 0
    assert main("report", str(run), "--out", str(tmp_path / "report.html")) == 0
    assert main("plan", "embedded") == 0
    assert main("doctor", str(run)) == 0
    assert main("recipes") == 0
    capsys.readouterr()


@pytest.mark.parametrize("method", METHODS)
def test_sft_of_trl(method: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    words = [f"w{number}" for number in range(95)]
    rows = [{"text": " ".join(words[start : start + 7])} for start in range(8)]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        ZOO["llama"].build(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=zoo_config(method, "llama"),
        processing_class=word_tokenizer(words, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = ZOO["llama"].inputs()
    loaded = PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded, inputs), logits(trainer.model.eval(), inputs))


@pytest.mark.parametrize("method", METHODS)
def test_add_adapter_and_load_adapter(method: str, tmp_path: Path) -> None:
    """transformers' own calls; under a limited pair of versions they end in our sentence."""
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs()
    config = zoo_config(method, "llama", init_weights=False)
    if required_peft() is not None:
        with pytest.raises(VersionError, match=r"asks for PEFT .* All else works"):
            model.add_adapter(config)
        return
    model.add_adapter(config)
    expected = logits(model.eval(), inputs)
    model.save_pretrained(str(tmp_path))
    again = ZOO["llama"].build()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again, inputs), expected)
