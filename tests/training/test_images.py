"""Conversations with images: read, checked, learned by models that see, asked, exported and merged."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tables import notes_of, tiny_recipe, write_jsonl
from typer.testing import CliRunner

from vision_models import save_tiny_qwen_vl, save_tiny_smolvlm
from ziggurat.cli import app
from ziggurat.cli.chat import _answer as answer_in_chat
from ziggurat.errors import DataError, RecipeError
from ziggurat.evaluation.own import read_file, score_rows
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict, read_texts, seen_with
from ziggurat.training.data.chat import IMAGE
from ziggurat.training.data.examples import Examples, load_examples
from ziggurat.training.loop.run import train
from ziggurat.training.model.generate import Sampling
from ziggurat.training.model.seeing import Writer, along, encode_images

FORMS = Path(__file__).parents[1] / "forms"
FILE, BLUE = FORMS / "images.jsonl", FORMS / "images" / "blue-32x32.png"


def read(data: Path, **more: Any) -> Examples:
    values = {"model": "m", "task": "instruct", "method.name": "lora", "data.train": str(data)}
    values |= {"data.validation": str(data)} | {key.replace("__", "."): value for key, value in more.items()}
    return load_examples(make_recipe(values))


def asked_about(*images: Any, text: Any = "what is it", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "blue"}]
    return {"messages": messages, "images": list(images), **more}


def test_images_in_parts_by_marks_and_beside_the_messages() -> None:
    examples = read(FILE)
    assert examples.shape == "messages" and examples.has_images and notes_of(examples) == []
    texts = [[message["content"] for message in json.loads(row)] for row in examples.train["messages"]]
    assert texts[0] == texts[4] == [f"{IMAGE}what colour is the sky", "blue"] and IMAGE not in "".join(texts[9])
    assert [message.count(IMAGE) for message in texts[7]] == [1, 0, 1, 0]
    names = [[Path(image["path"]).name for image in row] for row in examples.train["images"]]
    assert names[7] == ["green-40x40.png", "blue-32x32.png"] and names[9] == []


def test_bytes_of_parquet_base64_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    import base64

    import pyarrow as pa
    import pyarrow.parquet as pq

    content = BLUE.read_bytes()
    talk = asked_about()["messages"]
    rows = [{"messages": talk, "images": [{"bytes": content, "path": None}]}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").train[0]["images"] == [{"bytes": content, "path": None}]
    text = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    parts = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": text}}]
    examples = read(write_jsonl(tmp_path / "a.jsonl", [asked_about(text=parts) | {"images": None}]))
    assert examples.train[0]["images"] == [{"bytes": content, "path": None}]
    assert json.loads(examples.train[0]["messages"])[0]["content"] == f"what{IMAGE}"
    pairs = write_jsonl(tmp_path / "b.jsonl", [{"question": "what", "answer": "blue", "image": BLUE.name}])
    examples = read(pairs, data__as_chat=True, data__image_folder=str(BLUE.parent))
    assert examples.train[0]["images"][0]["path"] == str(BLUE)
    spaced = Path(shutil.copy(BLUE, tmp_path / "my blue.png"))
    for address in (spaced.as_uri(), f"file://{spaced}"):
        named = read(write_jsonl(tmp_path / "c.jsonl", [asked_about(address)]))
        assert named.train[0]["images"][0]["path"] == str(spaced)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [asked_about("no.png"), asked_about("nor.png"), asked_about("broken.png"), asked_about("good.png")],
            r"3 of 4 rows cannot be used; take them out of the file, or set data.drop_missing: true\n"
            r"  rows 1, 2: an image file is missing, the first is '.*no.png'\n"
            r"  row 3: an image cannot be read \(UnidentifiedImageError\), the first is '.*broken.png'",
        ),
        ([asked_about("good.png", text="<image> and <image>")], "row 1: 2 places for images in the messages, and 1 im"),
        ([asked_about("http://a.b/c.png")], "row 1: an image is given by a web address: download it"),
        ([asked_about("good.png", text=f"a {IMAGE}")], r"row 1: a text holds the sign '\\ufffc', which stands for"),
        ([asked_about(7)], "row 1: an image is the path of a file, or its bytes; this is an int"),
    ],
)
def test_every_row_with_an_image_that_cannot_be_read_is_told(rows: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    shutil.copyfile(BLUE, tmp_path / "good.png")
    with pytest.raises(DataError, match=message):
        read(write_jsonl(tmp_path / "a.jsonl", rows))


def test_rows_without_their_image_are_left_out_if_asked(tmp_path: Path) -> None:
    shutil.copyfile(BLUE, tmp_path / "good.png")
    data = write_jsonl(tmp_path / "a.jsonl", [asked_about("no.png"), asked_about("good.png")])
    examples = read(data, data__drop_missing=True)
    assert len(examples.train) == 1 and "leaves out 1 of 2 rows" in examples.notes[0]


def test_what_is_learned_is_found_behind_the_places_of_images() -> None:
    ids, mask = [1, 9, 5, 6, 7, 9, 5, 6, 7], [0, 0, 0, 1, 1, 0, 0, 1, 1]  # 9: an image; 6 7: the answer
    full = [1, 8, 9, 9, 6, 7, 8, 5, 6, 7, 8, 9, 9, 8, 5, 6, 7]
    assert along(ids, mask, full, {9}) == [0] * 8 + [1, 1] + [0] * 5 + [1, 1]
    with pytest.raises(DataError, match="differently from the chat template"):
        along(ids, mask, full[:-1], {9})


def _qwen(folder: Path) -> None:
    pytest.importorskip("torchvision")
    save_tiny_qwen_vl(folder)


@pytest.mark.parametrize("save", [save_tiny_smolvlm, _qwen], ids=["smolvlm", "qwen"])
def test_a_model_that_sees_learns_answers_and_is_exported(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / "model")
    recipe = tiny_recipe(
        tmp_path / "model", FILE, tmp_path / "out", task="instruct", train__batch=5, train__epochs=4,
        data__validation=str(FILE), data__validation_rows=None, method__target_modules="all-linear", train__answers=1,
    )  # fmt: skip
    result = train(recipe)
    assert result.after["perplexity"] < result.before["perplexity"] / 4
    assert any(note.startswith("the language model is adapted; the image encoder stays") for note in result.notes)
    assert set(result.answers[0]) == {"question", "expected", "before", "after"}
    assert result.example_images and Path(result.example_images[0]).is_file()
    loaded = load_adapter_model(result.folder)
    adapted = [name for name, _ in loaded.model.named_parameters() if "msplora" in name]
    assert adapted and not [name for name in adapted if "visual" in name or "vision" in name or "connector" in name]

    # The tokens that are learned are those of the answers, and their places hold in the batches.
    writer = Writer(loaded.processor)
    rows, _, length, _ = encode_images(recipe, writer, loaded.model.config, load_examples(recipe))
    ends = ("<end_of_utterance>", "<|im_end|>", " ", "\n")
    learned = [loaded.tokenizer.decode([token for token in row["labels"] if token != -100]) for row in rows]
    texts = [re.sub("|".join(map(re.escape, ends)), "", text) for text in learned]
    assert texts == ["blue", "green"] * 3 + ["blue", "greenblue", "bluegreen", "yes"]
    assert length >= max(len(row["input_ids"]) for row in rows)

    files, _ = read_texts(FILE, loaded)
    together = [str(item.answer) for item in predict(loaded, files[:3], max_new_tokens=6)]
    assert together == [str(predict(loaded, [item], max_new_tokens=6)[0].answer) for item in files[:3]]
    with pytest.raises(DataError, match="--image: an image file is missing"):
        seen_with("what", ["no.png"])
    words = ["predict", str(result.folder), "what colour is the sky", "--image", str(BLUE), "--tokens", "6"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.output.strip() == together[0], done.output
    question = "what colour is the sky"
    answered = answer_in_chat(loaded, [{"role": "user", "content": question}], None, Sampling(6))
    assert answered == predict(loaded, [question], max_new_tokens=6)[0].answer
    scored = score_file(loaded, FILE)
    assert scored.scores["perplexity"] == pytest.approx(result.after["perplexity"], rel=1e-3)

    card = (result.folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-text-to-text" in card and "base = AutoModelForImageTextToText.from_pretrained(" in card
    for command in ("export", "merge"):
        done = CliRunner().invoke(app, [command, str(result.folder), str(tmp_path / command)])
        assert done.exit_code == 0, done.output
    _same_logits(loaded, tmp_path, rows)


def score_file(loaded: Any, file: Path) -> Any:
    table, notes = read_file(loaded.recipe, loaded.head, file)
    return score_rows(loaded, file, table, notes)


def _same_logits(loaded: Any, folder: Path, rows: Any) -> None:
    """Merged model and exported LoRA see what the adapter sees."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ziggurat.training.model.seeing import ImageCollator

    processor = AutoProcessor.from_pretrained(str(folder / "merge"))
    batch = ImageCollator(Writer(processor))([rows[0], rows[7]])
    batch.pop("labels")
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    merged = AutoModelForImageTextToText.from_pretrained(str(folder / "merge")).eval()
    base = AutoModelForImageTextToText.from_pretrained(str(folder / "model"))
    exported = PeftModel.from_pretrained(base, str(folder / "export")).eval()
    with torch.no_grad():
        wanted = loaded.model(**batch).logits
        for model in (merged, exported):
            torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-3, rtol=1e-3)
        assert (loaded.model(**other).logits - wanted).abs().max() > 1e-3


def test_the_other_tower_or_both(tmp_path: Path) -> None:
    from ziggurat.training.loop.run import make_model

    save_tiny_smolvlm(tmp_path / "model")
    adapted = {}
    for tower in ("vision", "both"):
        recipe = tiny_recipe(tmp_path / "model", FILE, tmp_path / "out", task="instruct", tower=tower)
        _, model, _ = make_model(recipe, load_examples(recipe))
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        adapted[tower] = {"vision" if "vision" in name else "language" for name in names}
    assert adapted == {"vision": {"vision"}, "both": {"vision", "language"}}
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), str(_written(tmp_path, tmp_path / "model"))])
    assert done.exit_code == 0, done.output


def _written(folder: Path, model: Path) -> Path:
    recipe = folder / "seen.yaml"
    recipe.write_text(
        f"task: instruct\nmodel: {model}\ndata.train: {FILE}\nmethod.name: msplora\nmethod.r: 4\ntower: vision\n"
    )
    return recipe


def test_a_model_without_eyes_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sees no images, and the data have some"):
        train(tiny_recipe(tiny_llama, FILE, tmp_path / "out", task="instruct"))
    with pytest.raises(RecipeError, match="tower: both sees images, and the data have none"):
        train(tiny_recipe(tiny_llama, FORMS / "chat.jsonl", tmp_path / "out", task="instruct", tower="both"))
    with pytest.raises(RecipeError, match="tower: has no meaning with task: classification"):
        tiny_recipe(tiny_llama, FILE, tmp_path / "out", tower="both")
