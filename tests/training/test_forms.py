"""Instruction data, conversations and plain text in the forms that other tools write them in; ten rows each."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_tables import WORDS, notes_of, tiny_recipe, write_jsonl
from transformers import AutoConfig

from word_tokenizer import word_tokenizer
from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import load_recipe, make_recipe, resolved
from ziggurat.recipe.schema import Recipe
from ziggurat.training.answers.predict import predict
from ziggurat.training.data.alpaca import alpaca_prompt
from ziggurat.training.data.examples import Examples, load_examples
from ziggurat.training.data.tokens import encode_rows
from ziggurat.training.loop.run import train

FORMS = Path(__file__).parents[1] / "forms"


def recipe(data: Path, **more: Any) -> Recipe:
    values = {"model": "m", "task": "instruct", "method.name": "lora", "data.train": str(data)}
    values |= {"data.validation": str(data)}
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return make_recipe({key: value for key, value in values.items() if value is not None})


def read(name: str, **more: Any) -> Examples:
    return load_examples(recipe(FORMS / name, **more))


def conversations(examples: Examples) -> list[list[dict[str, Any]]]:
    return [json.loads(row) for row in examples.train["messages"]]


def test_messages_with_system_prompts_and_several_turns() -> None:
    examples = read("chat.jsonl")
    assert examples.shape == "messages" and notes_of(examples) == []
    first = [message["role"] for message in conversations(examples)[0]]
    assert first == ["system", "user", "assistant", "user", "assistant"]


def test_sharegpt_with_a_system_column_calls_and_tools() -> None:
    examples = read("sharegpt.jsonl")
    rows = conversations(examples)
    assert rows[0] == [
        {"role": "user", "content": "what colour is the sky"},
        {"role": "assistant", "content": "green"},
        {"role": "user", "content": "is the sky good"},
        {"role": "assistant", "content": "yes"},
    ]
    assert rows[1][0] == {"role": "system", "content": "say one colour"}
    # Each call keeps its own arguments, and no key of another row's.
    calls = [row[-3]["tool_calls"][0]["function"] for row in rows[6:]]
    assert calls[0] == {"name": "colour", "arguments": {"film": "scene", "deep": {"one": [1, 2]}}}
    assert calls[1] == {"name": "colour", "arguments": {"name": "actor"}}
    assert [message["role"] for message in rows[6]] == ["user", "assistant", "tool", "assistant"]
    tool = json.loads(examples.train["tools"][6])[0]
    assert tool["type"] == "function" and tool["function"]["name"] == "colour"
    assert json.loads(examples.train["tools"][0]) == []


def test_calls_whose_arguments_are_json_texts() -> None:
    rows = conversations(read("tools.jsonl"))
    assert [row[1]["tool_calls"][0]["function"]["arguments"] for row in rows[:2]] == [
        {"place": ["sky"]},
        {"name": "grass"},
    ]
    assert rows[0][2] == {"role": "tool", "content": "green", "tool_call_id": "call_0"}


def test_parquet_and_json_give_the_same_conversations(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("chat.jsonl", "tools.jsonl"):
        rows = [json.loads(line) for line in (FORMS / name).read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert conversations(load_examples(recipe(tmp_path / "a.parquet"))) == conversations(read(name))


def test_names_of_columns_and_roles_of_ones_own(tmp_path: Path) -> None:
    row = {"dialog": [{"who": "Kunde", "what": "say yes"}, {"who": "Berater", "what": "yes"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    keys = {"data__columns__messages": "dialog", "data__columns__role": "who", "data__columns__content": "what"}
    roles = {"data__roles__user": ["Kunde"], "data__roles__assistant": ["Berater"]}
    messages = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    assert conversations(load_examples(recipe(path, **keys, **roles))) == [messages]
    with pytest.raises(DataError, match=r"a message has the role 'Kunde'; known are .*: name it in data.roles.user"):
        load_examples(recipe(path, **keys))
    with pytest.raises(DataError, match=r"data.columns.messages: .* has no column 'dialogs', did you mean dialog"):
        load_examples(recipe(path, **{**keys, "data__columns__messages": "dialogs"}))


def test_keys_of_columns_are_nested_or_dotted_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    nested = "data: {train: a.csv, columns: {prompt: Frage}, roles: {user: [Kunde]}}"
    path.write_text(f"task: instruct\nmodel: m\nmethod.name: lora\n{nested}\n")
    made = load_recipe(path, ["data.columns.completion=Antwort"])
    assert (made.data.columns.prompt, made.data.columns.completion) == ("Frage", "Antwort")
    flat = resolved(made)
    assert flat["data.columns.prompt"] == "Frage" and flat["data.roles.user"] == ["Kunde"]
    assert make_recipe(flat) == made.model_copy(update={"name": "mine"})
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ["data.columns.promt=x", "data.columns=x"])
    assert "data.columns.promt: unknown, did you mean data.columns.prompt?" in str(error.value)
    assert "data.columns: needs its own keys, for example data.columns.prompt: question" in str(error.value)


def test_questions_and_answers_by_their_own_names() -> None:
    named = {"data__columns__prompt": "Frage", "data__columns__completion": "Antwort"}
    examples = read("questions.csv", **named)
    assert examples.train[0]["prompt"] == "what colour is the sky" and examples.train[0]["completion"] == "green"
    assert examples.notes[:2] == [
        f"{FORMS / 'questions.csv'}: column not read: 'id'",
        "prompts and answers are joined with nothing in between; end prompts by a blank, or set data.as_chat: true",
    ]
    chat = read("questions.csv", **named, data__as_chat=True)
    assert chat.shape == "messages"
    assert conversations(chat)[1] == [
        {"role": "user", "content": "what colour is the grass"},
        {"role": "assistant", "content": "blue"},
    ]


def test_usual_names_of_questions_and_answers(tmp_path: Path) -> None:
    for prompt, completion in (("question", "answer"), ("query", "response"), ("prompt", "response")):
        examples = load_examples(recipe(write_jsonl(tmp_path / "a.jsonl", [{prompt: "say one", completion: "one"}])))
        assert (examples.shape, examples.train[0]["prompt"]) == ("prompt", "say one")
    dolly = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "name", "context": "one", "response": "two"}])
    assert load_examples(recipe(dolly)).train[0]["prompt"] == alpaca_prompt("name", "one")


def test_alpaca_with_history_and_system_as_a_chat(tmp_path: Path) -> None:
    row = {"instruction": "and the grass", "input": "say one", "output": "green", "system": "be brief"}
    row |= {"history": [["what colour is the sky", "blue"]]}  # type: ignore[dict-item]
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    chat = load_examples(recipe(path, data__as_chat=True))
    assert [message["content"] for message in conversations(chat)[0]] == [
        *("be brief", "what colour is the sky", "blue", "and the grass\n\nsay one", "green")
    ]
    assert chat.train[0]["learned"] == 4  # the history is asked with, not learned
    plain = load_examples(recipe(path))
    assert [note.partition(" have ")[2] for note in plain.notes[:2]] == [
        f"{name}, which is learned only with data.as_chat: true" for name in ("history", "system")
    ]


def test_rows_of_other_tasks_are_not_taken_for_instructions(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="marks good answers in its column label, and instruct would learn the bad ones too: set task"
    ):
        read("kto.jsonl")
    assert len(read("kto.jsonl", data__format="prompt").train) == 10
    for name in ("pairs.jsonl", "chat_pairs.jsonl"):
        with pytest.raises(DataError, match="pairs of a chosen and a rejected answer: set task: dpo"):
            read(name)
    # A label that is no verdict is a column like others.
    rows = [{"prompt": "say one", "completion": "one", "label": "numbers"}]
    assert len(load_examples(recipe(write_jsonl(tmp_path / "a.jsonl", rows))).train) == 1


def test_all_bad_rows_come_at_once_or_are_left_out(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes"}]}
    rows = [good, {"messages": []}, {"messages": [{"role": "user"}]}, good, {"messages": good["messages"][:1]}]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"messages": [{"role": "bear", "content": "hi"}]}])
    with pytest.raises(DataError) as error:
        load_examples(recipe(path))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("a.jsonl: 4 of 6 rows cannot be used; mend them, or take them out")
    assert [line.partition(":")[0] for line in lines[1:]] == ["  row 2", "  row 3", "  row 5", "  row 6"]
    write_jsonl(path, [row for row in rows if row != rows[2]])
    with pytest.raises(DataError, match=r"2 of 4 rows cannot be used; .* or set data.drop_missing: true"):
        load_examples(recipe(path))
    examples = load_examples(recipe(path, data__drop_missing=True))
    assert list(examples.train["row"]) == [1, 3]
    assert examples.notes[0].endswith("no conversation (row 2); no message of the assistant (row 4)")


def tokens(examples: Examples, made: Recipe, length: int = 64) -> tuple[list[list[int]], list[list[int]], list[str]]:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    tokenizer = word_tokenizer([*WORDS, "user", "assistant", "system", "tool"], **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
    config = AutoConfig.for_model("llama", max_position_embeddings=length)
    rows, _, _, notes = encode_rows(made, tokenizer, config, examples)
    return list(rows["input_ids"]), list(rows["completion_mask"]), notes


def test_plain_text_by_document_and_packed() -> None:
    for name in ("texts.txt", "documents.jsonl"):
        made = recipe(FORMS / name, data__max_length=16)
        examples = load_examples(made)
        assert examples.shape == "text" and len(examples.train) == 10
        ids, mask, notes = tokens(examples, made)
        assert len(ids) == 10 and max(map(len, ids)) <= 16 and all(all(row) for row in mask)
        packed = recipe(FORMS / name, data__max_length=16, data__packing=True)
        pieces, mask, more = tokens(examples, packed)
        whole, _, _ = tokens(examples, recipe(FORMS / name, data__max_length=64 * 4), length=256)
        assert [token for piece in pieces for token in piece] == [token for row in whole for token in row]
        assert {len(piece) for piece in pieces[:-1]} == {16} and [len(row) for row in mask] == list(map(len, pieces))
        assert f"10 training rows are packed into {len(pieces)} of 16 tokens" in more
    assert "9 of 10 training rows are longer than 16 tokens and were cut" in notes
    chat = recipe(FORMS / "chat.jsonl", data__packing=True)
    with pytest.raises(DataError, match=r"data.packing: joins rows of plain text, and .* has answers to learn"):
        tokens(load_examples(chat), chat)


def test_what_is_learned_of_a_conversation_is_a_key() -> None:
    counts = {}
    for loss in ("answer", "last", "all"):
        made = recipe(FORMS / "chat.jsonl", data__loss=loss)
        ids, mask, _ = tokens(load_examples(made), made)
        counts[loss] = [sum(row) for row in mask]
        if loss == "all":
            assert counts[loss] == list(map(len, ids))
    # An answer is a word, the end, and the role, which this template opens no answer with.
    assert counts["answer"][:2] == [6, 3] and counts["last"][:2] == [3, 3]


def test_the_length_comes_from_the_data_and_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "say " * count, "completion": "yes"} for count in [*range(10, 105), *[600] * 5]]
    made = recipe(write_jsonl(tmp_path / "a.jsonl", rows))
    ids, _, notes = tokens(load_examples(made), made, length=4096)
    # 95 of 100 rows have at most 104 words in the prompt, a word's answer and the end.
    assert notes[0] == "training rows have 61 tokens in the median, 106 at the 95th percentile, 602 at most"
    assert notes[1] == "data.max_length is not given: 128 tokens, which at least 95% of the training rows fit into"
    assert "5 of 100 training rows have no answer within 128 tokens and are left out" in notes and len(ids) == 95
    _, _, notes = tokens(load_examples(made), made, length=48)
    assert notes[1] == "data.max_length is not given: 48 tokens, the most that m takes"


def test_what_a_chat_template_leaves_out_is_counted_and_refusals_name_rows_of_the_file(tmp_path: Path) -> None:
    made = recipe(FORMS / "tools.jsonl", data__loss="last")
    _, _, notes = tokens(load_examples(made), made)
    assert "10 of 10 training rows have tools, which the chat template leaves out" in notes
    assert "10 of 10 training rows have calls of tools, which the chat template leaves out" in notes
    rows: list[dict[str, Any]] = [json.loads(line) for line in (FORMS / "chat.jsonl").read_text().splitlines()]
    rows.insert(0, {"messages": [*rows[0]["messages"][:2], {"role": "assistant", "content": ""}]})
    made = recipe(write_jsonl(tmp_path / "a.jsonl", rows))
    examples = load_examples(made)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    tokenizer = word_tokenizer([*WORDS, "user", "assistant"], **special)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    )
    with pytest.raises(DataError, match=r"training rows of .*: 4 of 10 rows cannot be used; .*\n  rows 2, 5, 8, 11"):
        encode_rows(made, tokenizer, AutoConfig.for_model("llama"), examples)


@pytest.mark.parametrize("name", ["sharegpt.jsonl", "texts.txt"])
def test_a_run_from_the_file_to_an_answer(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    more = {"task": "instruct", "data__validation_rows": 2, "train__max_steps": 2}
    result = train(tiny_recipe(tiny_llama, FORMS / name, tmp_path / "out", **more))
    assert result.after["perplexity"] > 0
    assert isinstance(predict(result.folder, ["what colour is the sky"], max_new_tokens=2)[0].answer, str)
