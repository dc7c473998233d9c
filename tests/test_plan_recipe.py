"""A recipe's plan against its run: the head by labels and pooling, the file to the byte, the memory of its settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

# Tables of the training tests serve here too.
from training_tables import _save_tokenizer, save_tiny_bert, tiny_recipe, write_csv
from transformers import BertConfig, RobertaConfig, RobertaForMaskedLM

from methods_table import METHODS
from test_plan import config_folder, without_dropout
from ziggurat.plan import plan, plan_recipe
from ziggurat.plan.memory import checkpointed_bytes, saved_bytes
from ziggurat.training.loop.run import train
from zoo import ZOO

PAIRS = [
    {"a": f"the film is very {word}", "b": "the sky is blue", "label": label}
    for word, label in [("good", "p"), ("bad", "n"), ("dull", "d"), ("fine", "f")] * 8
]
QUICK: dict[str, Any] = {"data__text": "a", "train__max_steps": 1, "train__evaluate_before": False}


def check_against_the_run(recipe: Any) -> Any:
    planned = plan_recipe(recipe.model, recipe)
    run = train(recipe)
    assert (planned.adapter, planned.head) == (run.counts.adapter, run.counts.head)
    assert planned.file == (run.folder / "adapter_model.safetensors").stat().st_size
    assert planned.memory is not None and planned.memory.activations is not None
    return planned


@pytest.mark.parametrize(
    ("more", "head"),
    [
        ({"head__pooling": "mean", "data__text_pair": "b"}, (4 * 32 + 1) * 4),
        ({"head__pooling": "mean"}, (32 + 1) * 4),
        ({"data__text_pair": "b"}, (32 + 1) * 4),
    ],
)
def test_four_classes_one_text_or_two_either_pooling(more: dict[str, Any], head: int, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "bert")
    data = write_csv(tmp_path / "pairs.csv", PAIRS)
    actual = check_against_the_run(tiny_recipe(tmp_path / "bert", data, tmp_path / "out", **QUICK, **more))
    assert actual.head == head and not actual.notes


def test_numbers_to_predict_and_a_pooler_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(str(tmp_path / "roberta"))
    _save_tokenizer(tmp_path / "roberta", chat=False)
    data = write_csv(tmp_path / "scores.csv", [{**row, "label": len(row["a"])} for row in PAIRS])
    more = {"task": "regression", "head__pooling": "mean", "method__num_groups": 1}
    actual = check_against_the_run(tiny_recipe(tmp_path / "roberta", data, tmp_path / "out", **QUICK, **more))
    assert actual.head == 33 + 33 * 32


def test_what_is_not_here_is_assumed_and_said(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    folder = config_folder(tmp_path / "bert", config, "BertModel")
    recipe = tiny_recipe(folder, tmp_path / "nowhere.csv", tmp_path / "out", train__precision="bf16")
    notes = " | ".join(plan_recipe(folder, recipe).notes)
    assert "2 classes are assumed: the data can't be read" in notes and "no safetensors weights here" in notes
    assert "train.precision bf16" in notes
    named = tiny_recipe(folder, tmp_path / "nowhere.csv", tmp_path / "out", data__label_names=["a", "b", "c"])
    planned = plan_recipe(folder, named, measure_memory=False)
    assert planned.head == 17 * 3 and "classes" not in " ".join(planned.notes)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointed_activations(name: str) -> None:
    """Between forward and backward a real checkpointed model keeps what is counted, less the layer computed again."""
    zoo = ZOO[name]
    task, length = ("classification" if name == "bert" else "instruct"), 32
    with torch.device("meta"):
        bare = without_dropout(zoo.build())
    whole = plan(bare, METHODS["msplora"].config(zoo), task=task, batch=3, length=length).memory
    again = plan(bare, METHODS["msplora"].config(zoo), task=task, batch=3, length=length, checkpointing=True).memory
    assert whole is not None and again is not None and whole.activations and again.activations
    model = get_peft_model(without_dropout(zoo.build()), METHODS["msplora"].config(zoo)).train()
    ids = torch.full((3, length), 7)
    inputs = {"input_ids": ids, "labels": torch.tensor([0, 1, 2]) if name == "bert" else ids}
    most, everything = checkpointed_bytes(model, inputs), saved_bytes(model, inputs)
    assert again.activations == pytest.approx(most, rel=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = saved_bytes(model, inputs)
    layers = len([path for path, _ in model.named_modules() if path.rpartition(".")[2].isdigit()])
    one_layer = (everything - kept) / layers
    assert kept < most < everything and most == pytest.approx(kept + one_layer, rel=0.15)


def test_a_base_in_four_bits_weighs_what_bitsandbytes_stores(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from ziggurat.training.model.base import HeadSpec, load_base

    save_tiny_bert(tmp_path / "bert")
    data = write_csv(tmp_path / "pairs.csv", PAIRS)
    more = {"method__name": "qlora", "method__target_modules": ["query", "value"], "data__label_names": list("dfnp")}
    planned = plan_recipe(tmp_path / "bert", tiny_recipe(tmp_path / "bert", data, tmp_path / "out", **QUICK, **more))
    base = load_base(str(tmp_path / "bert"), HeadSpec("classification", list("dfnp")), four_bits=True).model
    stored = 0
    for parameter in base.parameters():
        stored += parameter.numel() * parameter.itemsize
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            stored += state.absmax.nbytes + state.state2.absmax.nbytes
    assert planned.memory is not None
    assert planned.memory.weights == pytest.approx(stored, rel=0.02)
    plain = plan_recipe(
        tmp_path / "bert",
        tiny_recipe(tmp_path / "bert", data, tmp_path / "out", **QUICK, **{**more, "method__name": "lora"}),
    )
    assert plain.memory is not None and planned.memory.weights < 0.5 * plain.memory.weights
