"""Distillation: a student learns a teacher's probabilities on the student's answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stops import StopAt
from training_tables import save_tiny_llama, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import make_recipe, resolved, to_yaml
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.loop.result import Result
from ziggurat.training.loop.run import train

PROMPTS = Path(__file__).parents[1] / "forms" / "prompts.jsonl"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the student's tokens and other weights."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_tiny_llama(folder)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(str(folder)).config).save_pretrained(str(folder))
    return folder


def options(teacher: Path, **more: Any) -> dict[str, Any]:
    short: dict[str, Any] = {"task": "distill", "teacher__model": str(teacher), "sampling__tokens": 4}
    short |= {"data__validation": str(PROMPTS), "data__validation_rows": None, "method__target_modules": "all-linear"}
    short |= {"train__batch": 5, "train__eval_batch": 4, "train__max_steps": 12, "train__epochs": 9, "train__save": 4}
    return {**short, **more}


@pytest.fixture(scope="module")
def run(tiny_llama: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tiny_recipe(tiny_llama, PROMPTS, tmp_path_factory.mktemp("run") / "out", **options(teacher)))


@torch.no_grad()
def test_a_student_comes_nearer_to_its_teacher(run: Result, teacher: Path) -> None:
    assert run.metric == "divergence" and run.after["divergence"] < 0.7 * run.before["divergence"]
    assert 1 <= run.after["tokens"] <= 4
    # KL(student | teacher), over the tokens of each prompt's likeliest completion, all tokens at once.
    loaded, theirs = load_adapter_model(run.folder), AutoModelForCausalLM.from_pretrained(str(teacher))
    student: Any = loaded.model
    total, tokens = 0.0, 0
    for line in PROMPTS.read_text().splitlines():
        asked = loaded.tokenizer(line[len('{"prompt": "') : -len('"}')], return_tensors="pt")["input_ids"]
        ids = student.generate(input_ids=asked, do_sample=False, max_new_tokens=4)
        p, q = (model(ids).logits[0, asked.shape[1] - 1 : -1].double().log_softmax(-1) for model in (student, theirs))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(p)
    assert run.after["divergence"] == pytest.approx(total / tokens, rel=1e-3)
    assert any(note.startswith(f"the teacher {teacher} has ") for note in run.notes)
    assert (run.folder / "recipe.yaml").read_text().count("teacher.") == 3


def test_a_resumed_student_ends_as_one_that_was_never_stopped(
    run: Result, tiny_llama: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(tiny_recipe(tiny_llama, PROMPTS, tmp_path / "out", **options(teacher)), callbacks=[StopAt(5, times=2)])
    again = train(tiny_recipe(tiny_llama, PROMPTS, tmp_path / "out", **options(teacher, resume=True)))
    ours, theirs = (load_file(each.folder / "adapter_model.safetensors") for each in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and again.after == run.after


def test_what_is_no_teacher_is_told(tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    def start(**more: Any) -> None:
        train(tiny_recipe(tiny_llama, PROMPTS, tmp_path / "out", **options(teacher, **more)))

    other = tmp_path / "other"
    save_tiny_llama(other)
    tokenizer = AutoTokenizer.from_pretrained(str(other))
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(str(other))
    with pytest.raises(RecipeError, match=r"teacher.model: the tokens of .*other .* are not those of .*tiny-llama"):
        start(teacher__model=str(other))
    with pytest.raises(RecipeError, match=r"teacher.model: '.*/none' does not exist; .* holds other"):
        start(teacher__model=str(tmp_path / "none"))
    with pytest.raises(RecipeError, match=r"method.lora_dropout: 0.1 would draw completions from another model"):
        start(method__lora_dropout=0.1)
    with pytest.raises(DataError, match=r"train.batch: a step takes 20 prompts, and .* has 10 to learn"):
        start(train__batch=20)
    values = {"data.train": "a", "model": "m", "method.name": "lora"}
    with pytest.raises(RecipeError) as error:
        make_recipe({**values, "rlhf_type": "gkd", "task": "distill", "teacher_model": "t", "sampling.completions": 4})
    assert str(error.value).splitlines()[1:] == [
        "  rlhf_type: unknown, did you mean task: distill?",
        "  teacher_model: unknown, did you mean teacher.model?",
        "  sampling.completions: has no meaning with task: distill",
        "  teacher.model: missing: folder or hub name of the model to learn from, which has the student's tokens",
    ]
    # A teacher is a path like a model, and other recipes say nothing of one.
    made = make_recipe({**values, "task": "distill", "teacher.model": str(teacher)})
    assert resolved(made)["teacher.model"] == str(teacher.resolve())
    assert "teacher" not in to_yaml(make_recipe({**values, "task": "instruct"}))
