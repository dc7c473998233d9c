"""Preference data in the forms that they come in, and TRL's trainers on them."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_tables import notes_of, tiny_recipe, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import make_recipe
from ziggurat.recipe.schema import Recipe
from ziggurat.training.answers.predict import predict
from ziggurat.training.data.examples import Examples, load_examples
from ziggurat.training.data.pairs import encode_judged, encode_pairs
from ziggurat.training.loop.run import train

FORMS = Path(__file__).parents[1] / "forms"
ASKED = {"role": "user", "content": "what colour is the sky"}


def recipe(data: Path, task: str = "dpo", **more: Any) -> Recipe:
    values = {"model": "m", "task": task, "method.name": "lora", "data.train": str(data), "data.validation": str(data)}
    return make_recipe({**values, **{key.replace("__", "."): value for key, value in more.items()}})


def pairs(path: Path, *rows: dict[str, Any], **more: Any) -> Examples:
    return load_examples(recipe(write_jsonl(path / "a.jsonl", list(rows)), **more))


def message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [ASKED, message("blue")], "rejected": [ASKED, message("awful")]},
        {"prompt": [ASKED], "chosen": [message("blue")], "rejected": [message("awful")]},
        {"prompt": ASKED["content"], "chosen": [ASKED, message("blue")], "rejected": [ASKED, message("awful")]},
        {"prompt": ASKED["content"], "chosen": [message("blue")], "rejected": [message("awful")]},
        {
            "conversations": [{"from": "human", "value": ASKED["content"]}],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "awful"},
        },
    ],
)
def test_pairs_of_conversations(row: dict[str, Any], tmp_path: Path) -> None:
    actual = pairs(tmp_path, row)
    made = actual.train[0]
    assert actual.shape == "messages" and not notes_of(actual)
    assert json.loads(made["messages"]) == [ASKED, message("blue")]
    assert json.loads(made["messages_rejected"]) == [ASKED, message("awful")]
    assert made["learned"] == made["learned_rejected"] == 1


def test_pairs_of_texts(tmp_path: Path) -> None:
    examples = load_examples(recipe(FORMS / "pairs.jsonl"))
    row = {name: examples.train[0][name] for name in ("prompt", "completion", "completion_rejected")}
    assert row == {"prompt": "what colour is the sky ", "completion": "green", "completion_rejected": "dull"}
    whole = {"chosen": "Human: what colour Assistant: blue green", "rejected": "Human: what colour Assistant: black"}
    made = pairs(tmp_path, whole).train[0]
    assert made["prompt"] == "Human: what colour Assistant: "
    assert (made["completion"], made["completion_rejected"]) == ("blue green", "black")
    chat = load_examples(recipe(FORMS / "pairs.jsonl", data__as_chat=True)).train[0]
    assert json.loads(chat["messages_rejected"])[1] == message("dull")


def test_what_makes_no_pair(tmp_path: Path) -> None:
    good = {"prompt": "say", "chosen": "yes", "rejected": "no"}
    bad = [{**good, "rejected": "yes"}, {**good, "chosen": ""}]
    with pytest.raises(DataError) as error:
        pairs(tmp_path, good, *bad)
    assert str(error.value).splitlines()[1:] == ["  row 2: both answers are the same", "  row 3: an answer is empty"]
    assert list(pairs(tmp_path, good, *bad, data__drop_missing=True).train["row"]) == [1]
    with pytest.raises(DataError, match=r"data.columns.rejected: .* has no column 'rejected'"):
        pairs(tmp_path, {"prompt": "say", "chosen": "yes"})
    with pytest.raises(DataError, match="no beginning in common, and there is no prompt"):
        pairs(tmp_path, {"chosen": [ASKED], "rejected": [message("yes")]})


def test_judged_answers(tmp_path: Path) -> None:
    examples = load_examples(recipe(FORMS / "kto.jsonl", task="kto"))
    assert list(examples.train["good"]) == [False, True] * 5 and examples.train[0]["completion"] == "awful"
    rows = [{"prompt": "say", "completion": "yes", "mark": mark} for mark in (1, 0, "perhaps")]
    with pytest.raises(DataError, match=r"row 3: no verdict in column 'mark': true or false is needed"):
        pairs(tmp_path, *[{**row, "mark": str(row["mark"])} for row in rows], task="kto", data__label="mark")
    with pytest.raises(DataError, match=r"all answers of .* are good; kto needs both"):
        pairs(tmp_path, rows[0], task="kto", data__label="mark")


def test_tokens_of_pairs_are_those_that_trl_makes(tiny_llama: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama))
    config = AutoConfig.from_pretrained(str(tiny_llama))
    for name in ("pairs.jsonl", "chat_pairs.jsonl"):
        made = recipe(FORMS / name)
        ours, _, length, _ = encode_pairs(made, tokenizer, config, load_examples(made))
        rows = [json.loads(line) for line in (FORMS / name).read_text().splitlines()]
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(str(tiny_llama)),
            args=DPOConfig(str(tmp_path), report_to=[], bf16=False, max_length=64),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        theirs = trainer.train_dataset
        assert length == 64
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert list(ours[column]) == list(theirs[column]), (name, column)


def test_rows_without_room_for_an_answer_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama))
    row = {"prompt": "say " * 3, "chosen": "yes " * 3, "rejected": "no"}
    made = recipe(write_jsonl(tmp_path / "a.jsonl", [row, {**row, "prompt": "say " * 9}]), data__max_length=6)
    rows, _, _, notes = encode_pairs(made, tokenizer, AutoConfig.for_model("llama"), load_examples(made))
    assert len(rows) == 1 and notes[1:3] == [
        "2 of 2 training rows are longer than 6 tokens and were cut",
        "1 of 2 training rows have no answer within 6 tokens and are left out",
    ]
    judged = recipe(FORMS / "kto.jsonl", task="kto")
    table, _, _, _ = encode_judged(judged, tokenizer, AutoConfig.for_model("llama"), load_examples(judged))
    good = tokenizer("blue</s>")["input_ids"]
    assert all((ids == good) == label for ids, label in zip(table["completion_ids"], table["label"], strict=True))
    assert list(table["label"]) != [False, True] * 5  # shuffled with the seed


@pytest.mark.parametrize("method", ["msplora", "pissa", "full"])
def test_dpo_prefers_the_better_answer(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    data = FORMS / "pairs.jsonl"
    more: dict[str, Any] = {"task": "dpo", "data__validation": str(data), "data__validation_rows": None}
    more |= {"method__name": method, "train__max_steps": 8, "train__batch": 4, "train__lr": 0.01}
    more |= {"method__r": None} if method == "full" else {"method__target_modules": "all-linear"}
    result = train(tiny_recipe(tiny_llama, data, tmp_path / "out", **more))
    assert result.metric == "rewards/accuracies"
    assert result.before["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert result.after["rewards/accuracies"] == 1.0 and result.after["rewards/margins"] > 0.1
    assert not (result.folder / "ref").exists()
    assert isinstance(predict(result.folder, ["what colour is the sky"], max_new_tokens=1)[0].answer, str)


def test_kto_parts_good_answers_from_bad_ones(tiny_llama: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"task": "kto", "data__validation": str(FORMS / "kto.jsonl"), "data__validation_rows": None}
    more |= {"train__max_steps": 8, "train__batch": 5, "method__target_modules": "all-linear"}
    result = train(tiny_recipe(tiny_llama, FORMS / "kto.jsonl", tmp_path / "out", **more))
    assert result.metric == "rewards/margins" and result.after["rewards/margins"] > 0.1
    with pytest.raises(RecipeError, match="kto compares the rows of a batch; at least 2"):
        train(tiny_recipe(tiny_llama, FORMS / "kto.jsonl", tmp_path / "one", **{**more, "train__batch": 1}))
