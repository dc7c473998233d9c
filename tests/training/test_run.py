"""Whole runs on tiny models: each task, each kind of method, reload, refusal to overwrite."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftModel
from rich.console import Console
from stops import StopAt
from training_tables import notes_of, reviews, save_tiny_llama, tiny_recipe, write_csv, write_jsonl
from transformers import TrainerCallback

from ziggurat.errors import DataError, RecipeError, StorageError
from ziggurat.recipe.recipe import load_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.folder import run_folder as folders
from ziggurat.training.loop.report import report
from ziggurat.training.loop.result import Result
from ziggurat.training.loop.run import train


def run_info(result: Result) -> dict[str, Any]:
    return json.loads((result.folder / "run.json").read_text())


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_classification_learns_and_reloads_exactly(
    pooling: str, tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", head__pooling=pooling, train__epochs=10)
    result = train(made)
    assert result.after["accuracy"] >= 87.5 > result.guess["accuracy"]
    # MSPLoRA r 4 with three mid groups on query and value of 4 layers, d 32: ranks 4, 2, 1; LoRA: rank 4 everywhere.
    assert result.counts.adapter == 2 * (32 + 32) * (4 + 3 * 2 + 4 * 1)
    assert result.counts.lora == 2 * 4 * 4 * (32 + 32)
    assert result.counts.total == result.counts.adapter + result.counts.head
    assert sorted(path.name for path in (tmp_path).glob("out*")) == ["out"]
    assert not list(result.folder.glob("*.bin"))

    loaded = load_adapter_model(result.folder)
    texts = [row["text"] for row in reviews(8)]
    answers = predict(loaded, texts)
    assert [prediction.answer for prediction in answers] == [row["label"] for row in reviews(8)]
    for answer in answers:
        assert answer.shares is not None and sum(answer.shares.values()) == pytest.approx(1.0, abs=1e-5)
    assert predict(result.folder, texts[:1]) == predict(loaded, texts[:1])

    info, stored = run_info(result), yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert info["after"] == result.after and info["head"]["label_names"] == ["neg", "pos"]
    assert stored["method.r"] == 4 and stored["seed"] == 42 and "torch" in info["versions"]
    # What the card says loads what was trained.
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.rpartition("```python")[2].partition("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)


def test_stock_peft_reloads_the_stock_head(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    result = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=3))
    ours = load_adapter_model(result.folder)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(str(result.folder)).eval()
    inputs = ours.tokenizer("the film is very good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).logits, ours.model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_two_texts_and_regression(pooling: str, tiny_bert: Path, tmp_path: Path) -> None:
    words = ["good", "bad", "blue", "green"]
    rows: list[dict[str, Any]] = [
        {"first": f"the film is {a}", "second": f"the film is {b}", "score": 5.0 * (a == b)}
        for a in words
        for b in (a, words[0], words[1])
    ]
    data = write_csv(tmp_path / "pairs.csv", rows * 3)
    made = tiny_recipe(
        tiny_bert,
        data,
        tmp_path / "out",
        task="regression",
        head__pooling=pooling,
        data__text="first",
        data__text_pair="second",
        data__label="score",
        train__max_steps=4,
    )
    result = train(made)
    assert set(result.after) >= {"pearson", "spearman", "rmse"} and result.guess["pearson"] == 0.0
    predictions = predict(result.folder, ["the film is good", "the film"], ["the film is bad", "story"])
    assert all(isinstance(item.answer, float) for item in predictions)
    # One pair alone gives the same number as among others: padding changes nothing.
    alone = predict(result.folder, ["the film"], ["story"])[0].answer
    assert alone == pytest.approx(predictions[1].answer, abs=1e-5)
    with pytest.raises(DataError, match="compares two texts"):
        predict(result.folder, ["the film is good"])


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "head", "full"])
def test_baselines_run_and_reload(method: str, tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    rank = 4 if method in ("lora", "dora") else None
    made = tiny_recipe(
        tiny_bert, reviews_csv, tmp_path / "out", method__name=method, method__r=rank, train__max_steps=2
    )
    result = train(made)
    assert (result.counts.lora is None) == (rank is None)
    if method == "lora":
        assert result.counts.adapter == result.counts.lora
    if method == "head":
        assert result.counts.adapter == 0 < result.counts.head
    assert predict(result.folder, ["the film is good"])[0].answer in ("neg", "pos")
    before = load_adapter_model(result.folder).run["after"]["accuracy"]
    texts = [row["text"] for row in reviews(48)]
    assert len(predict(result.folder, texts)) == 48 and 0.0 <= before <= 100.0
    assert len({file.stat().st_mode for file in result.folder.iterdir() if file.is_file()}) == 1  # the umask's


def test_the_head_learns_at_its_own_rate(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:

    seen: list[dict[float, int]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            sizes: dict[float, int] = {}
            for group in optimizer.param_groups:
                sizes[group["lr"]] = sizes.get(group["lr"], 0) + sum(p.numel() for p in group["params"])
            seen.append(sizes)

    made = tiny_recipe(
        tiny_bert,
        reviews_csv,
        tmp_path / "out",
        train__max_steps=1,
        train__scheduler="constant",
        train__warmup=0.0,
        train__lr=0.01,
        head__lr=0.001,
    )
    result = train(made, callbacks=[Watch()])
    assert seen == [{0.01: result.counts.adapter, 0.001: 32 * 2 + 2}]


def test_instruction_tuning_lowers_the_perplexity_and_answers(tiny_llama: Path, tmp_path: Path) -> None:
    pairs = [("what colour sky", "blue"), ("what colour grass", "green"), ("say yes", "yes"), ("say no", "no")]
    data = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"{a} ", "completion": b} for a, b in pairs * 12])
    made = tiny_recipe(
        tiny_llama,
        data,
        tmp_path / "out",
        task="instruct",
        data__validation=str(data),
        data__validation_rows=None,
        data__max_length=32,
        train__max_steps=25,
        method__r=8,
        method__target_modules="all-linear",
    )
    result = train(made)
    assert result.metric == "perplexity" and result.after["perplexity"] < 0.5 * result.before["perplexity"]
    predictions = predict(result.folder, ["what colour sky "], max_new_tokens=2)[0]
    assert isinstance(predictions.answer, str)


def test_rows_that_lose_their_answer_are_counted_before_training(tiny_llama: Path, tmp_path: Path) -> None:
    long = {"instruction": "say yes", "input": "the film " * 40, "output": "yes"}
    late = {"prompt": "the film " * 4, "completion": "yes no " * 8}
    short = {"prompt": "say yes", "completion": "yes"}
    wide = {"prompt": "the film " * 8, "completion": "yes"}
    made = tiny_recipe(
        tiny_llama,
        write_jsonl(tmp_path / "train.jsonl", [wide, late, short] * 4),
        tmp_path / "out",
        task="instruct",
        data__validation_rows=None,
        data__validation=str(write_jsonl(tmp_path / "val.jsonl", [wide, short])),
        data__max_length=16,
        train__max_steps=1,
    )
    assert [note for note in notes_of(train(made)) if "warm-up" not in note][1:] == [
        "8 of 12 training rows are longer than 16 tokens and were cut",
        "4 of 12 training rows have no answer within 16 tokens and are left out",
        "1 of 2 validation rows are longer than 16 tokens and were cut",
        "1 of 2 validation rows have no answer within 16 tokens and are left out",
    ]
    for_all = made.model_copy(update={"data": made.data.model_copy(update={"loss": "all"}), "overwrite": True})
    assert "4 of 12 training rows have no answer within 16 tokens" in train(for_all).notes
    write_jsonl(tmp_path / "train.jsonl", [short])
    write_jsonl(tmp_path / "val.jsonl", [wide])
    with pytest.raises(DataError, match="none of the 1 validation rows has an answer within 16 tokens, which"):
        train(made.model_copy(update={"overwrite": True}))
    lost = write_jsonl(tmp_path / "long.jsonl", [long] * 10)
    with pytest.raises(DataError, match=r"none of the 2 training rows .* 64 tokens, .* takes no more, so shorten"):
        train(tiny_recipe(tiny_llama, lost, tmp_path / "lost", task="instruct"))


@pytest.mark.parametrize("chat", [False, True])
def test_the_tokens_of_answers_are_those_that_trl_makes(chat: bool, tiny_llama: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from ziggurat.training.data.examples import load_examples
    from ziggurat.training.data.tokens import encode_rows

    asked, answer = ("what colour sky is", "the sky is blue")
    row: dict[str, Any] = {"prompt": asked, "completion": answer}
    if chat:
        row = {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
    data = write_jsonl(tmp_path / "a.jsonl", [row] * 2)
    table, tokenizer = Dataset.from_list([row] * 2), AutoTokenizer.from_pretrained(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    more = {"task": "instruct", "data__validation": str(data), "data__validation_rows": None}
    made = tiny_recipe(tiny_llama, data, tmp_path / "out", **more)
    ours, _, length, _ = encode_rows(made, tokenizer, model.config, load_examples(made))
    arguments = SFTConfig(report_to=[], max_length=64, bf16=False, completion_only_loss=True)
    batches = []
    for rows in (table, ours):
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        batches.append(trainer.data_collator([trainer.train_dataset[0]]))
    assert length == 64
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("input_ids", "labels"))


def test_alpaca_is_asked_in_the_form_that_the_run_records(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "say yes", "output": "yes"}] * 16)
    result = train(tiny_recipe(tiny_llama, data, tmp_path / "out", task="instruct", train__max_steps=1))
    assert run_info(result)["prompt_form"] == "stanford_alpaca"
    loaded, asked = load_adapter_model(result.folder), []

    class Noting:
        def __call__(self, text: str) -> Any:
            asked.append(text)
            return loaded.tokenizer(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.tokenizer, name)

    old = {key: value for key, value in loaded.run.items() if key != "prompt_form"}
    for run in (loaded.run, old):
        predict(replace(loaded, run=run, tokenizer=Noting()), ["say yes"], max_new_tokens=1)
    assert [text.rpartition("### ")[2] for text in asked] == ["Response:", "Response:\n"]


def test_a_text_longer_than_the_models_positions_loses_no_answers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    save_tiny_llama(tmp_path / "model")
    sizes = {"n_positions": 12, "n_embd": 32, "n_layer": 4, "n_head": 2, "eos_token_id": 4, "bos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes)).save_pretrained(str(tmp_path / "model"))
    data = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "say yes", "completion": "yes"}] * 16)
    more = {"task": "instruct", "train__max_steps": 1, "method__name": "lora"}
    result = train(tiny_recipe(tmp_path / "model", data, tmp_path / "out", **more))
    assert len(predict(result.folder, ["say yes", "say " * 11], max_new_tokens=100)) == 2
    with pytest.raises(DataError, match=r"text 2 of 3 has 12 tokens, and .*model takes 12, including the answer"):
        predict(result.folder, ["say yes", "say " * 12, "say no"])


def test_bf16_trains_on_a_processor(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=2, train__precision="bf16")
    assert train(made).steps == 2


def test_a_place_where_no_folder_can_be_made(tiny_bert: Path, reviews_csv: Path) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("this system has no /proc")
    with pytest.raises((RecipeError, StorageError), match=r"no folder can be made in '/proc'|not a folder that can be"):
        train(tiny_recipe(tiny_bert, reviews_csv, Path("/proc/x")))


def test_messages_and_the_whole_text(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": turn}] * 16)
    made = tiny_recipe(
        tiny_llama, data, tmp_path / "out", task="instruct", data__loss="all", train__max_steps=2, train__evaluate=1
    )
    result = train(made)
    assert run_info(result)["shape"] == "messages"
    assert isinstance(predict(result.folder, ["say yes"], max_new_tokens=2)[0].answer, str)


def test_the_same_seed_gives_the_same_adapter(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "a", train__max_steps=3))
    again = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "b", train__max_steps=3))
    weights = [(result.folder / "adapter_model.safetensors").read_bytes() for result in (first, again)]
    assert weights[0] == weights[1] and first.before == again.before and first.after == again.after


def test_scoring_first_changes_nothing_and_can_be_left_out(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "a", train__max_steps=3))
    without = train(
        tiny_recipe(tiny_bert, reviews_csv, tmp_path / "b", train__max_steps=3, train__evaluate_before=False)
    )
    assert "accuracy" in first.before and without.before == run_info(without)["before"] == {}
    weights = [(result.folder / "adapter_model.safetensors").read_bytes() for result in (first, without)]
    assert weights[0] == weights[1]
    console = Console(record=True, width=100)
    console.print(report(load_recipe(without.folder / "recipe.yaml"), without))
    assert "after" in (printed := console.export_text()) and "before" not in printed


def test_the_best_checkpoint_can_be_kept(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    made = tiny_recipe(
        tiny_bert,
        reviews_csv,
        tmp_path / "out",
        train__evaluate=2,
        train__save=2,
        train__best=True,
        train__max_steps=8,
        metric="matthews",
    )
    result = train(made)
    scores = [line["eval_matthews"] for line in result.history if "eval_matthews" in line]
    assert result.after["matthews"] == max(scores[1:-1])


def test_sigterm_leaves_a_checkpoint_and_gives_the_signals_back(
    tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=6)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6") as stopped:
        train(made, callbacks=[Terminate()])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert stopped.value.signal == signal.SIGTERM
    assert stopped.value.checkpoint is not None and stopped.value.checkpoint.endswith("checkpoint-3")
    assert [path.name for path in tmp_path.glob("out*")] == ["out.unfinished"]
    with pytest.raises(RecipeError, match="is an unfinished run"):
        load_adapter_model(tmp_path / "out.unfinished")
    resumed = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=6, resume=True))
    assert resumed.steps == 6 and [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.parametrize(("save", "checkpoint"), [("never", None), (2, "checkpoint-2")])
def test_a_second_ctrl_c_ends_the_run_where_it_is(
    tiny_bert: Path, reviews_csv: Path, tmp_path: Path, save: str | int, checkpoint: str | None
) -> None:
    made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=6, train__save=save)
    with pytest.raises(Interrupted, match=r"^stopped at step 3 of 6$") as stopped:
        train(made, callbacks=[StopAt(3, times=2)])
    assert checkpoint == (stopped.value.checkpoint and Path(stopped.value.checkpoint).name)


def test_a_second_run_never_overwrites_in_silence(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=1)
    first = train(made)
    before = (first.folder / "run.json").read_bytes()
    with pytest.raises(RecipeError, match=r"holds a finished run already.*another output=.*overwrite=true"):
        train(made)
    with pytest.raises(RecipeError, match="is finished"):
        train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=1, resume=True))
    assert (first.folder / "run.json").read_bytes() == before
    again = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=2, overwrite=True))
    assert again.steps == 2 and run_info(again)["steps"] == 2
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_overwrite_never_touches_a_folder_of_others(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "letter.txt"
    precious.parent.mkdir()
    precious.write_text("dear")
    with pytest.raises(RecipeError, match="was not written by a run"):
        train(tiny_recipe(tiny_bert, reviews_csv, precious.parent, overwrite=True))
    with pytest.raises(RecipeError, match="holds something else already"):
        train(tiny_recipe(tiny_bert, reviews_csv, precious.parent))
    assert precious.read_text() == "dear"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method__target_modules": ["quary"]}, r"'quary' matches no module, did you mean query\?"),
        ({"method__num_groups": 9}, "layers"),
        ({"train__precision": "fp16"}, "fp16 needs an accelerator"),
        ({"resume": True}, "no checkpoint under"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(
    more: dict[str, Any], message: str, tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    if "fp16" in message and torch.accelerator.is_available():
        pytest.skip("this machine can")
    with pytest.raises(RecipeError, match=message):
        train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", **more))
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_is_not_there(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model: .*nearest in .*tiny-bert"):
        train(tiny_recipe(tiny_bert.with_name("tiny-bart"), reviews_csv, tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"model: .* is a folder without config\.json"):
        train(tiny_recipe(tmp_path, reviews_csv, tmp_path / "out"))


def test_pruned_directions_are_dropped_before_saving(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    fields = {"method__name": "lora2", "method__target_rank": 1, "method__initial_warmup": 2, "method__final_warmup": 2}
    result = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=10, **fields))
    ranks = json.loads((result.folder / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(ranks.values()) == 8  # one direction for each of 8 linears, wherever they went
    assert run_info(result)["left"]["active"] < result.counts.adapter
    loaded = load_adapter_model(result.folder)
    assert sum(p.numel() for n, p in loaded.model.named_parameters() if "lora2_" in n) == result.left["active"]
    assert len(predict(loaded, ["a good film", "a dull plot"])) == 2


def test_paths_are_counted_as_stored_and_active(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    fields = {"method__name": "lor2c", "method__target_modules": None, "method__merges": 2}
    result = train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=8, **fields))
    assert result.left == {"stored": 4 * 2 * 4 * 32, "active": 2 * 2 * 4 * 32, "trained": 2 * 2 * 4 * 32}
    assert run_info(result)["left"] == result.left


@pytest.mark.parametrize(
    ("stop", "steps", "more"),
    [
        (3, 8, {"train__evaluate": 3}),
        (4, 8, {"train__evaluate": 3}),
        (4, 8, {"train__evaluate": "epoch"}),
        (2, 9, {"train__group_by_length": True}),
        (7, 9, {"train__group_by_length": True}),
    ],
)
def test_a_resumed_run_goes_on_bitwise(
    stop: int, steps: int, more: dict[str, Any], tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    """Scoring draws random numbers; the resumed run has dropout, and must see the same ones, and the same batches."""
    settings = {"train__max_steps": steps, "method__lora_dropout": 0.3, **more}
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of {steps}"):
        train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", **settings), callbacks=[StopAt(stop)])
    train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", **settings, resume=True))
    train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "straight", **settings))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "straight")]
    assert files[0] == files[1]


@pytest.mark.parametrize("changed", ["data.train", "data.validation", "model"])
def test_a_run_whose_files_have_changed_is_not_resumed(
    changed: str, tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    places = {"data.train": reviews_csv, "data.validation": tmp_path / "val.csv", "model": tmp_path / "model"}
    shutil.copy(reviews_csv, places["data.validation"])
    shutil.copytree(tiny_bert, places["model"])
    settings = {
        "data__validation_rows": None,
        "data__validation": str(places["data.validation"]),
        "train__max_steps": 3,
    }
    with pytest.raises(Interrupted):
        train(tiny_recipe(places["model"], reviews_csv, tmp_path / "out", **settings), callbacks=[StopAt(2)])
    place = places[changed] / "tokenizer_config.json" if changed == "model" else places[changed]
    before = place.read_bytes()
    place.write_bytes(before + b"\n")
    again = tiny_recipe(places["model"], reviews_csv, tmp_path / "out", **settings, resume=True)
    with pytest.raises(RecipeError, match=rf"{changed}: the files that it names have changed since the run began"):
        train(again)
    place.write_bytes(before)
    assert run_info(train(again))["content"].keys() == places.keys()


def test_a_run_of_a_version_that_computed_otherwise_is_not_resumed(
    tiny_bert: Path, reviews_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=3), callbacks=[StopAt(2)])
    monkeypatch.setattr(folders, "COMPUTATION", folders.COMPUTATION + 1)
    with pytest.raises(RecipeError, match="it was begun by a version that computes differently"):
        train(tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=3, resume=True))


def test_the_table_shows_scores_cost_and_what_to_try_next(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=1)
    result = train(made)
    console = Console(record=True, width=1000, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(made, result))
    text = console.export_text()
    for part in (
        f"{result.before['accuracy']:.2f}",
        "majority-class baseline",
        f"{result.counts.adapter:,}",
        f"{result.counts.lora:,} ",
        f"ziggurat predict {result.folder} ",
        f"ziggurat export {result.folder} {result.folder}-lora",
        f"ziggurat merge {result.folder} {result.folder}-merged",
    ):
        assert part in text, part


def test_the_table_names_the_ranks_that_took_effect(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    plain = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", train__max_steps=1)
    result = train(plain)
    console = Console(record=True, width=1000, file=open("/dev/null", "w"))  # noqa: SIM115
    ranks = {"method__r": None, "method__init_r": 6, "method__target_r": 3}
    for more in ({"method__name": "adalora", **ranks}, {"method__r": None}):
        made = tiny_recipe(tiny_bert, reviews_csv, tmp_path / "out", **more)
        counts = replace(result.counts, lora_rank=made.method.get("init_r", 8))
        console.print(report(made, replace(result, method=made.method["name"], counts=counts)))
    text = console.export_text()
    assert "AdaLoRA r 6 to 3: tiny" in text and "LoRA r 6, same layers" in text
    assert "MSPLoRA: tiny" in text and "LoRA r 8, same layers" in text


def test_a_run_is_compared_with_lora_of_its_largest_tier(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> None:
    """Not with LoRA of the field r; and less than half a per cent of it isn't said as 0%."""
    tiers = [{"name": "global", "groups": 1, "r": 2}]
    recipe = tiny_recipe(
        tiny_bert, reviews_csv, tmp_path / "out", method__r=None, method__tiers=tiers, train__max_steps=1
    )
    result = train(recipe)
    assert result.counts.lora_rank == 2
    assert result.counts.lora == result.counts.adapter * 4  # four layers
    console = Console(record=True, width=1000, file=open("/dev/null", "w"))  # noqa: SIM115
    few = replace(result.counts, lora=result.counts.adapter * 240)
    console.print(report(recipe, result))
    console.print(report(recipe, replace(result, counts=few)))
    text = console.export_text()
    assert "LoRA r 2, same layers" in text and "(MSPLoRA trains 25% of that)" in text
    assert "(MSPLoRA trains 0.42% of that)" in text
