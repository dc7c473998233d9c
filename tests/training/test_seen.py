"""The output of a run: lines outside a terminal, the followed file, classes, answers, commands to paste."""

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training_tables import reviews, tiny_recipe, write_csv, write_jsonl
from transformers import TrainerCallback

from commands import main
from ziggurat.analysis.live import live_page, places_of, read_progress
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.loop.report import show
from ziggurat.training.loop.run import train
from ziggurat.training.model.generate import Sampling


class Follower(TrainerCallback):
    """Looks at a run's folder while it trains, as `ziggurat report --follow` does."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.pages: list[str] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        final, work = places_of(self.output)
        self.pages.append(live_page(final, read_progress(work)))


def test_a_run_is_seen_while_it_trains_and_afterwards(tiny_bert: Path, tmp_path: Path) -> None:
    rows = reviews(48)
    rows[-1]["text"] = "the <film> is\nvery 'good'"
    out = tmp_path / "a folder whose name is longer than the eighty columns that a terminal has, which is all there is"
    made = tiny_recipe(
        tiny_bert, write_csv(tmp_path / "a.csv", rows), out, train__group_by_length=True, train__evaluate=10
    )
    follower, log = Follower(out), tmp_path / "log.txt"
    with log.open("w") as file:
        console = Console(file=file, width=80)
        result = train(made, console=console, callbacks=[follower])
        show(console, made, result)
    shown = log.read_text()
    assert "step 20 of 25, loss " in shown and ", rate " in shown and " left\n" in shown
    assert 'http-equiv="refresh"' in follower.pages[-1]
    assert "<svg" in follower.pages[-1] and "<svg" not in follower.pages[0]
    assert not out.with_name(out.name + ".unfinished").exists()
    # Commands are whole lines, with a text of the validation rows.
    (predict,) = [line.strip() for line in shown.splitlines() if line.strip().startswith("ziggurat predict")]
    words = shlex.split(predict)
    assert words[:3] == ["ziggurat", "predict", str(out)] and words[3] in {" ".join(r["text"].split()) for r in rows}

    info = json.loads((out / "run.json").read_text())
    classes = info["by_class"]
    assert [row["name"] for row in classes["classes"]] == ["neg", "pos"]
    right = sum(classes["confusion"][place][place] for place in range(2))
    assert 100 * right / 8 == pytest.approx(result.after["accuracy"]) and len(classes["mistakes"]) == 8 - right
    # Rows of similar length are scored together: each mistake still stands beside its own text.
    of_text = {row["text"]: row["label"] for row in rows}
    assert all(of_text[wrong["text"]] == wrong["label"] for wrong in classes["mistakes"])
    page = tmp_path / "report.html"
    assert main("report", "--follow", f"{out}.unfinished", "--out", str(page)) == 0
    assert "by class (%), and its rows by answer" in page.read_text() and "refresh" not in page.read_text()


def test_answers_before_and_after(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"what colour is the {thing} ", "completion": colour}
        for thing, colour in (("sky", "blue"), ("grass", "green"))
    ]
    file = write_jsonl(tmp_path / "questions.jsonl", rows * 12)
    options: dict[str, Any] = {"task": "instruct", "data__validation": str(file), "data__validation_rows": None}
    result = train(tiny_recipe(tiny_llama, file, tmp_path / "out", train__answers=2, train__max_steps=20, **options))
    assert [(row["question"], row["expected"]) for row in result.answers] == [tuple(row.values()) for row in rows]
    assert all({"before", "after"} <= set(row) for row in result.answers)
    asked = ["predict", str(tmp_path / "out"), rows[0]["prompt"], "--json", "--tokens", "64"]
    capsys.readouterr()
    assert main(*asked) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == result.answers[0]["after"]
    none = train(tiny_recipe(tiny_llama, file, tmp_path / "none", train__answers=0, train__max_steps=20, **options))
    assert none.answers == [] and none.after == result.after


def test_a_resumed_run_may_ask_more_questions(tiny_llama: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("one", "two", "three")]
    file = write_jsonl(tmp_path / "questions.jsonl", rows * 4)
    options: dict[str, Any] = {"task": "instruct", "train__max_steps": 3}
    options |= {"data__validation": str(file), "data__validation_rows": None}
    with pytest.raises(Interrupted):
        train(tiny_recipe(tiny_llama, file, tmp_path / "out", train__answers=1, **options), callbacks=[Stop()])
    result = train(tiny_recipe(tiny_llama, file, tmp_path / "out", train__answers=3, resume=True, **options))
    assert [sorted(row) for row in result.answers] == [
        ["after", "before", "expected", "question"],
        *[["after", "expected", "question"]] * 2,
    ]


def test_what_is_logged_twice_at_a_step_is_kept(tmp_path: Path) -> None:
    lines = [{"step": 5, "steps": 5, "eval_accuracy": 80.0}, {"step": 5, "steps": 5, "train_runtime": 1.0}]
    (tmp_path / "progress.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_progress(tmp_path) == [{**lines[0], **lines[1]}]


def test_conversations_are_asked_and_talked_to(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ziggurat.training.answers.load import load_adapter_model
    from ziggurat.training.answers.predict import Conversation, predict

    talk = [
        {"role": "system", "content": "say the colour"},
        {"role": "user", "content": "what colour is the sky"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "and the grass"},
        {"role": "assistant", "content": "green"},
    ]
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": talk}, {"messages": talk[:3]}] * 6)
    out = train(tiny_recipe(tiny_llama, file, tmp_path / "out", task="instruct", train__max_steps=12)).folder
    capsys.readouterr()
    assert main("predict", str(out), "--file", str(file), "--json", "--tokens", "8") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in printed[:2]] == ["and the grass", "what colour is the sky"]
    loaded = load_adapter_model(out)
    # Asked alone, and among others of another length, the answers are the same; the earlier turns are read.
    alone = [predict(loaded, [Conversation(talk[:end])], max_new_tokens=8)[0].answer for end in (4, 2)]
    assert [row["answer"] for row in printed[:2]] == alone
    system = predict(loaded, ["what colour is the sky"], system="say the colour", max_new_tokens=8)[0]
    assert system.answer == alone[1]
    drawn = [
        predict(loaded, ["what colour"], sampling=Sampling(8, temperature=1.5, seed=seed))[0].answer
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1

    lines = iter(["what colour is the sky", "and the grass", "/new", "what colour is the sky", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main("chat", str(out), "--system", "say the colour", "--tokens", "8") == 0
    answers = capsys.readouterr().out.splitlines()[1:]
    assert len(answers) == 3 and answers[0].strip() == answers[2].strip() == alone[1]
