"""Text to text: columns, a run of an encoder-decoder, its output, and the scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file
from stops import StopAt
from training_tables import WORDS, notes_of, save_tiny_t5, tiny_recipe, write_csv, write_jsonl
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

from commands import main
from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import load_recipe, make_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.data.examples import Examples, load_examples
from ziggurat.training.data.sources import encode_sources
from ziggurat.training.loop.result import Result
from ziggurat.training.loop.run import train
from ziggurat.training.loop.sequences import text_scores
from ziggurat.training.model.generate import Sampling, generate

FORM = Path(__file__).parents[1] / "forms" / "sources.jsonl"


def read(data: Path, **more: Any) -> Examples:
    values = {"model": "m", "task": "seq2seq", "method.name": "lora", "data.train": str(data)}
    return load_examples(make_recipe({**values, **{key.replace("__", "."): value for key, value in more.items()}}))


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    save_tiny_t5(folder)
    return folder


def options(**more: Any) -> dict[str, Any]:
    short = {"task": "seq2seq", "data__validation": str(FORM), "data__validation_rows": None, "train__epochs": 20}
    return {
        **short,
        "method__target_modules": "all-linear",
        "train__save": 20,
        "train__batch": 5,
        "train__lr": 0.01,
        **more,
    }


@pytest.fixture(scope="module")
def run(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tiny_recipe(tiny_t5, FORM, tmp_path_factory.mktemp("run") / "out", **options()))


def test_columns_by_their_usual_names_and_by_ones_own(tmp_path: Path) -> None:
    examples = read(FORM, data__validation=str(FORM))
    assert examples.shape == "source" and not notes_of(examples) and len(examples.train) == 10
    assert examples.train[1] == {"source": "the story was very bad", "target": "no", "row": 2}
    for names in (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary")):
        rows = [dict(zip(names, (f"a film {n}", n), strict=True)) for n in range(4)]
        made = read(write_csv(tmp_path / "a.csv", rows), data__validation_rows=1)
        assert {row["source"] for row in made.train} <= {f"a film {n}" for n in range(4)}
        assert all(row["source"].endswith(row["target"]) for row in made.train)
    named = {"data__columns__source": "de", "data__columns__target": "en"}
    words = (("ja", "yes"), ("ja", "aye"), ("nein", "no"))
    table = write_jsonl(tmp_path / "b.jsonl", [{"de": german, "en": english} for german, english in words])
    made = read(table, **named, data__validation_rows=1)
    assert list(made.validation["source"]) == ["nein"]  # equal sources stay on one side
    with pytest.raises(DataError, match=r"columns de, en, and seq2seq needs .*; name the column in .*target"):
        read(table, data__columns__source="de")
    pairs = (("a", "b"), ("a", " "), (None, "b"))
    rows = [{"source": source, "target": target} for source, target in pairs * 2]
    gaps = write_jsonl(tmp_path / "c.jsonl", rows)  # type: ignore[arg-type]
    with pytest.raises(DataError) as error:
        read(gaps)
    assert str(error.value).splitlines()[1:] == ["  rows 2, 5: the target is empty", "  rows 3, 6: the source is empty"]
    assert len(read(gaps, data__drop_missing=True, data__validation=str(FORM)).train) == 2


def test_sources_stand_behind_the_prefix_and_both_are_cut_and_counted(tiny_t5: Path) -> None:
    recipe = tiny_recipe(tiny_t5, FORM, FORM, **options(data__prefix="say : ", data__max_length=5, data__max_target=3))
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_t5))
    rows, _, most, notes = encode_sources(recipe, tokenizer, BartConfig(), load_examples(recipe))
    assert most == 3 and tokenizer.decode(rows[0]["input_ids"]) == "say [UNK] the film </s>"
    assert tokenizer.decode(rows[0]["labels"]) == "yes very </s>"
    assert notes[1] == "10 of 10 training sources are longer than 5 tokens and were cut"
    assert notes[2] == "training targets have 2 tokens in the median, 4 at the 95th percentile, 4 at most"


def test_a_run_learns_and_its_folder_writes_what_was_scored(
    run: Result, tiny_t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.metric == "rougeL" and run.before["rougeL"] < 50 and run.after["rougeL"] > 90
    assert run.before["perplexity"] > run.after["perplexity"] > 1
    assert [row["expected"] for row in run.answers] == ["yes very good", "no", "yes very good"]
    rows = [json.loads(line) for line in FORM.read_text().splitlines()]
    written = [str(each.answer) for each in predict(run.folder, [row["source"] for row in rows])]
    scores = text_scores(written, [row["target"] for row in rows])
    assert {name: float(of.mean()) for name, of in scores.items()} == pytest.approx(
        {name: run.after[name] for name in scores}
    )
    assert [row["after"] for row in run.answers] == written[:3]
    out = tmp_path / "scores.json"
    assert main("eval", str(run.folder), "--data", str(FORM), "--out", str(out)) == 0
    content = json.loads(out.read_text())
    assert content["scores"] == pytest.approx({name: run.after[name] for name in scores})
    low, high = content["intervals"]["exact_match"]
    assert low <= run.after["exact_match"] <= high
    # Half of the targets are what the model writes, the other half nothing like it.
    targets = [text if number % 2 else "unlike" for number, text in enumerate(written)]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{**row, "target": t} for row, t in zip(rows, targets, strict=True)])
    assert main("eval", str(run.folder), "--data", str(mixed), "--out", str(out)) == 0
    content = json.loads(out.read_text())
    low, high = content["intervals"]["rougeL"]
    assert low < content["scores"]["rougeL"] < high
    table = write_csv(tmp_path / "new.csv", [{"document": row["source"]} for row in rows[:2]])
    capsys.readouterr()
    assert main("predict", str(run.folder), "--file", str(table), "--json") == 0
    assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == written[:2]
    with pytest.raises(DataError, match="trained on sources, which have no input: give one text"):
        predict(run.folder, ["the film"], ["the story"])
    card = (run.folder / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "text2text-generation" in card
    again: Any = AutoPeftModelForSeq2SeqLM.from_pretrained(str(run.folder))
    ids = AutoTokenizer.from_pretrained(str(tiny_t5))(rows[0]["source"], return_tensors="pt")["input_ids"]
    ours: Any = load_adapter_model(run.folder).model
    starts = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(
        again(input_ids=ids, decoder_input_ids=starts).logits, ours(input_ids=ids, decoder_input_ids=starts).logits
    )


def test_a_resumed_run_ends_as_one_that_was_never_stopped(run: Result, tiny_t5: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tiny_recipe(tiny_t5, FORM, tmp_path / "out", **options()), callbacks=[StopAt(25, times=2)])
    resumed = train(tiny_recipe(tiny_t5, FORM, tmp_path / "out", **options(resume=True)))
    ours, theirs = (load_file(each.folder / "adapter_model.safetensors") for each in (resumed, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and resumed.after == run.after


def test_a_batch_of_sources_is_written_as_each_by_itself(tiny_t5: Path) -> None:
    """BART counts positions from the start: padded on the left, a shorter source would be another."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16}
    heads = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 4, "decoder_start_token_id": 4}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(WORDS) + 5, forced_eos_token_id=4, init_std=0.5, **sizes, **heads, **special)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_t5))
    asked = [tokenizer(text)["input_ids"] for text in ("the film", "the story was not very good and the plot is dull")]

    def written(prompts: list[list[int]]) -> Iterator[str]:
        return generate(model, tokenizer, prompts, Sampling(tokens=6))

    assert list(written(asked)) == [next(written([ids])) for ids in asked]
    assert next(written([[5] * 16]))
    with pytest.raises(DataError, match="has 17 tokens, and the model takes 16"):
        written([[5] * 17])


def test_rouge_of_words_in_any_script() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    written, target = "The cat sat on a mat, quietly.", "the cat lay on the mat"
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(target, written)
    ours = text_scores([written], [target])
    assert {name: float(ours[name][0]) for name in theirs} == pytest.approx(
        {name: 100 * score.fmeasure for name, score in theirs.items()}
    )
    other = text_scores(["Grüße aus Köln", "これは本です", "Жили были"], ["grüße aus Köln", "これは本", "жили-были"])
    assert list(np.round(other["rougeL"])) == [100, 80, 100] and list(other["exact_match"]) == [0, 0, 0]


def test_the_wrong_kind_of_model_or_key_is_told(tiny_t5: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is of type llama, which has no encoder; set task: instruct"):
        train(tiny_recipe(tiny_llama, FORM, tmp_path / "out", **options()))
    texts = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "say one", "completion": "one"}] * 4)
    with pytest.raises(RecipeError, match=r"is of type t5, which has an encoder and a decoder; set task: seq2seq"):
        train(tiny_recipe(tiny_t5, texts, tmp_path / "out", task="instruct", data__validation_rows=1))
    values = {"data.train": "a", "model": "m", "method.name": "lora"}
    with pytest.raises(RecipeError) as error:
        make_recipe({**values, "task": "summarization", "stage": "seq2seq_lm", "max_target_length": 9})
    assert str(error.value).splitlines()[1:] == [
        "  task: summarization is called seq2seq here",
        "  stage: unknown, did you mean task: seq2seq?",
        "  max_target_length: unknown, did you mean data.max_target?",
    ]
    with pytest.raises(RecipeError, match=r"data.prefix: has no meaning with task: instruct"):
        make_recipe({**values, "task": "instruct", "data.prefix": "x"})


def test_init_knows_sources_and_targets(tmp_path: Path) -> None:
    assert main("init", str(FORM), "--out", str(tmp_path / "made.yaml")) == 0
    recipe = load_recipe(tmp_path / "made.yaml")
    assert (recipe.task, recipe.model, recipe.method["name"]) == ("seq2seq", "google-t5/t5-small", "msplora")
