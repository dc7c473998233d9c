"""Tasks of lm-eval beyond the papers' four: units, filters, groups, tags as in stock lm-eval; code only by consent."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from letters import WORDS, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from ziggurat.errors import RecipeError
from ziggurat.evaluation import ready as ready_module
from ziggurat.evaluation.lm import evaluate
from ziggurat.evaluation.ready import ready, runs_code

pytest.importorskip("lm_eval")
ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files: perplexities, two filters, a group and a tag without a score of their own, and one that runs code."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"text": f"the sum is {word} .", "word": word} for word in WORDS[4:9]]
    write(folder / "rows.parquet", rows)
    where = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.parquet")}},
        "test_split": "test",
    }

    def metrics(*names: str) -> list[dict[str, Any]]:
        return [{"metric": name} for name in names]

    asked = {"output_type": "generate_until", "doc_to_text": "the sum is", "doc_to_target": "{{word}}"}
    asked["generation_kwargs"] = {"until": ["."], "max_gen_toks": 4, "do_sample": False}  # type: ignore[assignment]
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict-match", "^ *(never)$"), ("flexible-extract", r"(\w+)"))
    ]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    files: dict[str, dict[str, Any]] = {
        "words": {"task": "words", "tag": "letters", **where, **rolling, "metric_list": metrics(*ROLLING)},
        "sums": {"task": "sums", "tag": "letters", **where, **asked, "filter_list": filters, "metric_list": exact},
        "both": {"group": "both", "task": ["words", "sums"]},
        "summed": {"group": "summed", "task": ["sums"], "aggregate_metric_list": metrics("exact_match")},
        "code": {"task": "code", **where, **asked, "metric_list": exact, "unsafe_code": True},
        "with_code": {"group": "with_code", "task": ["words", {"group": "inner", "task": ["code"]}]},
    }
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def model(llama: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(str(llama)), AutoTokenizer.from_pretrained(str(llama))


def test_numbers_and_names_are_stock_lm_evals(tasks: Path, model: tuple[Any, Any]) -> None:
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    simple_evaluate: Any = lm_eval.simple_evaluate
    make: Any = huggingface.HFLM
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = make(pretrained=model[0], tokenizer=model[1], batch_size=8)
    stock = simple_evaluate(model=lm, tasks=["words", "sums"], task_manager=manager, bootstrap_iters=0)["results"]

    words, sums = evaluate(*model, ["words", "sums"], keep=tasks)
    assert words.per_cent == () and words.rows == sums.rows == 5
    assert words.scores == {name: pytest.approx(stock["words"][f"{name},none"]) for name in ROLLING}
    assert words.scores["word_perplexity"] > 1
    both = ("exact_match,strict-match", "exact_match,flexible-extract")
    assert sums.per_cent == both
    assert sums.scores == {name: pytest.approx(100 * stock["sums"][name]) for name in both}

    for name in ("both", "letters"):
        parts = {item.task: item for item in evaluate(*model, [name], keep=tasks)}
        assert parts == {"words": words, "sums": sums}
    assert evaluate(*model, ["sums"], keep=tasks, limit=2)[0].rows == 2


def test_the_names_of_the_scores_are_known_before(tasks: Path, data: Path, model: tuple[Any, Any]) -> None:
    for names, more in ((["words", "sums", "summed"], {"keep": tasks}), (["mmlu", "bbh", "drop"], {"data": data})):
        with ready(names, **more) as these:  # type: ignore[arg-type]
            known = {item.task: set(item.score_names()) for item in these}
        actual = evaluate(*model, names, limit=1, **more)  # type: ignore[arg-type]
        assert known == {item.task: set(item.scores) for item in actual}
    with ready(["both", "letters"], keep=tasks) as these:
        assert [item.score_names() for item in these] == [[], []]


def test_a_share_of_one_filter_keeps_its_plain_name(data: Path, model: tuple[Any, Any]) -> None:
    scores = {item.task: item for item in evaluate(*model, ["bbh", "drop"], data=data, limit=2)}
    assert scores["bbh"].per_cent == ("exact_match",) == tuple(scores["bbh"].scores)
    assert scores["drop"].per_cent == ("em", "f1") == tuple(scores["drop"].scores)


@pytest.mark.parametrize("name", ["code", "with_code"])
def test_code_of_the_model_runs_with_both_consents_only(
    name: str, tasks: Path, model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(RecipeError, match=rf"^{name} runs code .* not within the limits .* say --run-generated-code"):
        evaluate(*model, [name], keep=tasks)
    with pytest.raises(RecipeError, match=r"set HF_ALLOW_CODE_EVAL=1 too"):
        evaluate(*model, [name], keep=tasks, run_code=True)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    scores = {item.task: item.scores for item in evaluate(*model, [name], keep=tasks, run_code=True)}
    assert "exact_match" in scores["code"]


def test_lm_evals_own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its thousands of files those of seven tasks: reading all takes a quarter of a minute."""
    from lm_eval.tasks import manager as manager_module

    home = Path(str(manager_module.__file__)).parent
    for name in ("mbpp", "humaneval", "longproc", "mmlu", "gsm8k", "wikitext", "glue"):
        shutil.copytree(home / name, tmp_path / "tasks" / name)
    monkeypatch.setattr(manager_module, "__file__", str(tmp_path / "tasks" / "manager.py"))
    manager = ready_module._manager(["mbpp"], tmp_path / "none")
    for name in ("mbpp", "humaneval_instruct", "longproc"):
        assert runs_code(manager.task_index, name), name
    for name in ("mmlu", "gsm8k", "wikitext", "glue"):
        assert name in manager.all_tasks and not runs_code(manager.task_index, name), name
    monkeypatch.setattr(ready_module, "_manager", lambda *_: manager)
    with pytest.raises(RecipeError, match=r"^mbpp runs code that the model writes"), ready(["mbpp"]):
        pass
    with pytest.raises(RecipeError, match="knows no task no_such_task"), ready(["gsm8k", "no_such_task"]):
        pass
