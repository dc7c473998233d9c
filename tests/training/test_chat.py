"""Conversations: how they are read, how an adapter is asked, where its answers end."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_tables import notes_of, tiny_recipe, write_jsonl
from transformers import AutoTokenizer

from ziggurat.errors import DataError
from ziggurat.export import merge_model
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict, read_texts
from ziggurat.training.data.examples import load_examples
from ziggurat.training.data.template import asked_ids, end_of_turn
from ziggurat.training.data.tokens import tokens_of
from ziggurat.training.loop.run import train

ASKED, SAID = {"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}
#: Turns end in [SEP], texts in </s>; an answer is asked for behind [PAD], which conversations lack.
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant [PAD]{% endif %}"
)


def examples(path: Path, *rows: dict[str, Any]) -> Any:
    data = str(write_jsonl(path / "chat.jsonl", list(rows)))
    values = {"model": "m", "task": "instruct", "method.name": "lora", "data.train": data, "data.validation": data}
    return load_examples(make_recipe(values))


def turns(*contents: Any, **more: Any) -> dict[str, Any]:
    """A conversation of these contents; `more` are further keys of the last message."""
    roles = ["user", "assistant"] * len(contents)
    messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    messages[-1] |= more
    return {"messages": messages}


def test_parts_of_text_are_read_as_the_text(tmp_path: Path) -> None:
    parts = [[{"type": "text", "text": "say "}, {"type": "text", "text": "yes"}], [{"type": "text", "text": "yes"}]]
    actual = examples(tmp_path, turns(*parts))
    assert json.loads(actual.train[0]["messages"]) == [ASKED, SAID] and not notes_of(actual)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            turns([{"type": "video", "url": "x"}], [{"type": "text", "text": "yes"}]),
            "rows 1, 2: a message holds parts that are no",
        ),
        ({"instruction": ["a", "b"], "output": "c"}, "rows 1, 2: a text is needed, this is a list: ['a', 'b']"),
        ({"instruction": "a", "output": {"b": 1}}, "rows 1, 2: a text is needed, this is a dict: {'b': 1}"),
        (
            {"prompt": "a", "completion": [SAID]},
            "rows 1, 2: of prompt and answer one is a list of messages and one is a",
        ),
        ({"prompt": [ASKED], "completion": [ASKED]}, "rows 1, 2: no message of the assistant"),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        examples(tmp_path, row, row)
    assert message in str(error.value)


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    rows = [
        {**turns("say yes", "yes"), "id": 7},
        turns("say yes", "yes", weight=0.5),
        turns("say yes", ""),
        turns("say yes", "yes", "and"),
    ]
    actual, path = examples(tmp_path, *rows), tmp_path / "chat.jsonl"
    assert len(actual.train) == len(actual.validation) == 3
    lost = [
        f"{path}: column not read: 'id'",
        f"1 of 4 rows of {path} go on after the last answer; the messages after it are left out",
        f"1 of 4 rows of {path} have weight in their messages, which is not read",
        f"left out 1 of 4 rows of {path}: their answer is empty",
    ]
    assert notes_of(actual) == lost * 2


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training_tables import save_tiny_llama

    folder = tmp_path_factory.mktemp("chat") / "model"
    save_tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("row", [{"prompt": [ASKED], "completion": [SAID]}, {"messages": [ASKED, SAID]}])
def test_an_adapter_is_asked_as_it_was_trained_and_stops_where_turns_end(
    row: dict[str, Any], chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", [row] * 16)
    result = train(tiny_recipe(chat_model, data, tmp_path / "out", task="instruct", train__max_steps=1))
    notes = "\n".join(result.notes)
    assert "generation prompt ends in '[PAD]', which its conversations lack" in notes
    assert "ends a turn by [SEP], and the tokenizer a text by </s>" in notes
    loaded = load_adapter_model(result.folder)
    assert loaded.run["shape"] == "messages"
    generate, asked = loaded.model.generate, []

    def noting(input_ids: Any, **more: Any) -> Any:
        asked.append(input_ids[0].tolist())
        return generate(input_ids=input_ids, **more)

    monkeypatch.setattr(loaded.model, "generate", noting)
    predict(loaded, ["say yes"], max_new_tokens=2)
    ids, mask = tokens_of(loaded.recipe, loaded.tokenizer, load_examples(loaded.recipe).train, "training", [])[0]
    learned = ids[: mask.index(1)]
    assert asked == [learned] and loaded.tokenizer.pad_token_id not in learned
    ends = [loaded.tokenizer.eos_token_id, loaded.tokenizer.sep_token_id]
    assert loaded.model.generation_config.eos_token_id == ends
    merge_model(loaded.model, tmp_path / "merged", loaded.tokenizer)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == ends
    (conversation,), _ = read_texts(write_jsonl(tmp_path / "asked.jsonl", [{"prompt": [ASKED]}]), loaded)
    asked.clear()
    predict(loaded, [conversation], max_new_tokens=2)
    assert asked == [learned]


def test_a_plain_template_is_asked_with_its_whole_generation_prompt(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(chat_model))
    tokenizer.chat_template = TEMPLATE.replace(" [PAD]", "").replace("[SEP]", "</s>")
    opened = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked_ids(tokenizer, [ASKED]) == list(opened)
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="refuses messages of user, assistant: System role not supported"):
        asked_ids(tokenizer, [ASKED])
