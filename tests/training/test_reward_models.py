"""Reward models and ORPO, on the pairs that DPO learns from."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from stops import StopAt
from training_tables import tiny_recipe, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import main
from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import load_recipe, make_recipe
from ziggurat.training.answers.predict import predict
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.loop.preference import trl_classes
from ziggurat.training.loop.result import Result
from ziggurat.training.loop.run import train

FORMS = Path(__file__).parents[1] / "forms"
PAIRS = FORMS / "pairs.jsonl"


def options(task: str, data: Path = PAIRS, **more: Any) -> dict[str, Any]:
    short = {"task": task, "data__validation": str(data), "data__validation_rows": None, "train__max_steps": 8}
    return {**short, "method__target_modules": "all-linear", "train__batch": 4, "train__eval_batch": 3, **more}


def rating(**more: Any) -> dict[str, Any]:
    return options("reward", train__save=4, train__max_steps=16, **more)


@pytest.fixture(scope="module")
def reward(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("reward") / "out"
    return train(tiny_recipe(tiny_llama, PAIRS, folder, **rating()))


def scored(adapter: Path, out: Path) -> dict[str, Any]:
    assert main("eval", str(adapter), "--data", str(PAIRS), "--out", str(out)) == 0
    return json.loads(out.read_text())["scores"]


def test_a_reward_model_rates_the_better_answer_higher(
    reward: Result, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reward.metric == "rewards/accuracies" and reward.counts.head == 32
    assert reward.after["rewards/accuracies"] == 1.0 and reward.after["rewards/margins"] > 1
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    better, worse = (
        [float(each.answer) for each in predict(reward.folder, [r["prompt"] for r in rows], [r[name] for r in rows])]  # type: ignore[arg-type]
        for name in ("chosen", "rejected")
    )
    # Of ten pairs in batches of three, the last batch has one: the mean is that of the pairs all the same.
    margin = sum(a - b for a, b in zip(better, worse, strict=True)) / len(rows)
    assert reward.after["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    assert scored(reward.folder, tmp_path / "scores.json") == pytest.approx(
        {"accuracy": 100.0, "margin": margin}, rel=1e-4
    )
    # Stock PEFT reads the same score at the token that ends the answer.
    model: Any = AutoPeftModelForSequenceClassification.from_pretrained(str(reward.folder), num_labels=1).eval()
    ids = AutoTokenizer.from_pretrained(str(tiny_llama))(
        f"{rows[0]['prompt']}{rows[0]['chosen']}</s>", return_tensors="pt"
    )
    assert float(model(input_ids=ids["input_ids"]).logits) == pytest.approx(better[0], rel=1e-5)
    assert "AutoModelForSequenceClassification.from_pretrained" in (reward.folder / "README.md").read_text()
    assert reward.example == ["what colour is the sky", "green"]
    table = write_jsonl(tmp_path / "new.jsonl", [{"question": rows[0]["prompt"], "answer": rows[0]["chosen"]}])
    capsys.readouterr()
    assert main("predict", str(reward.folder), "--file", str(table), "--json") == 0
    assert json.loads(capsys.readouterr().out)["answer"] == pytest.approx(better[0], rel=1e-5)
    with pytest.raises(DataError, match="this adapter rates answers: give a prompt and an answer to it"):
        predict(reward.folder, ["what colour is the sky"])


def test_a_resumed_reward_model_is_the_same(reward: Result, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tiny_recipe(tiny_llama, PAIRS, tmp_path / "out", **rating()), callbacks=[StopAt(5, times=2)])
    again = train(tiny_recipe(tiny_llama, PAIRS, tmp_path / "out", **rating(resume=True)))
    ours, theirs = (load_file(each.folder / "adapter_model.safetensors") for each in (again, reward))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_orpo_of_conversations(tiny_llama: Path, tmp_path: Path) -> None:
    data = FORMS / "chat_pairs.jsonl"
    run = train(tiny_recipe(tiny_llama, data, tmp_path / "out", **options("orpo", data)))
    assert run.metric == "rewards/accuracies" and run.after["rewards/accuracies"] == 1.0
    assert run.after["nll_loss"] < run.before["nll_loss"] and run.after["log_odds_chosen"] > 1
    assert [note for note in run.notes if "experimental" in note] == [
        "TRL calls its trainer for task: orpo experimental: its next version may change or drop it"
    ]
    assert predict(run.folder, ["what colour is the grass"], max_new_tokens=2)[0].answer


def test_orpo_has_the_rewards_of_its_paper(tiny_llama: Path, tmp_path: Path) -> None:
    """r(x, y) = beta times the mean of ln p over the answer's tokens; before training the adapter changes nothing."""
    run = train(tiny_recipe(tiny_llama, PAIRS, tmp_path / "out", **options("orpo", train__max_steps=1, train__lr=1e-9)))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(str(tiny_llama)),
        AutoTokenizer.from_pretrained(str(tiny_llama)),
    )
    gaps = []
    for row in (json.loads(line) for line in PAIRS.read_text().splitlines()):
        rewards = []
        for answer in (row["chosen"], row["rejected"]):
            ids, start = (tokenizer(text)["input_ids"] for text in (f"{row['prompt']}{answer}</s>", row["prompt"]))
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            rewards.append(
                sum(float(logs[at - 1, ids[at]]) for at in range(len(start), len(ids))) / (len(ids) - len(start))
            )
        gaps.append(0.1 * (rewards[0] - rewards[1]))
    assert run.before["rewards/margins"] == pytest.approx(sum(gaps) / 10, rel=1e-4)
    assert run.before["rewards/accuracies"] == pytest.approx(sum(gap > 0 for gap in gaps) / 10)
    assert scored(run.folder, tmp_path / "scores.json")["margin"] == pytest.approx(
        run.after["rewards/margins"], rel=1e-4
    )
    assert math.isfinite(run.after["loss"])


def test_names_keys_and_columns(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"data.train": "a", "model": "m", "method.name": "lora"}
    with pytest.raises(RecipeError) as error:
        make_recipe({**values, "stage": "rm", "rlhf_type": "orpo", "task": "reward", "train.beta": 0.2, "head.lr": 0.1})
    assert str(error.value).splitlines()[1:] == [
        "  stage: unknown, did you mean task: reward?",
        "  rlhf_type: unknown, did you mean task: orpo?",
        "  train.beta: has no meaning with task: reward",
        "  head.lr: has no meaning with task: reward",
    ]
    lone = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "say", "chosen": "yes"}])
    with pytest.raises(
        DataError, match=r"data.columns.rejected: .* has no column 'rejected'; its columns: prompt, chosen"
    ):
        train(tiny_recipe(tiny_llama, lone, tmp_path / "out", task="reward"))
    with pytest.raises(RecipeError, match=r"task: orpo needs NoTrainer of trl, and TRL .* has none"):
        trl_classes("orpo", "trl", "NoTrainer")
    for task in ("orpo", "reward"):
        assert main("init", str(PAIRS), "--task", task, "--out", str(tmp_path / f"{task}.yaml")) == 0
        assert load_recipe(tmp_path / f"{task}.yaml").task == task
