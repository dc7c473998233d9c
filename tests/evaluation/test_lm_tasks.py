"""MMLU, BBH, DROP and HumanEval from local parquet: stock lm-eval gives the same numbers on the exported adapter."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ziggurat import MSPLoraConfig
from ziggurat.errors import DataError, RecipeError
from ziggurat.evaluation.lm import evaluate
from ziggurat.evaluation.local_tasks import PREFIX, write_tasks
from ziggurat.export import export

pytest.importorskip("lm_eval")
WORDS = [
    "A",
    "B",
    "C",
    "D",
    "0",
    "1",
    "2",
    "one",
    "two",
    "is",
    "the",
    "sum",
    "what",
    "answer",
    "so",
    "Q",
    ":",
    ".",
    "?",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that knows the letters of the choices."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "letters"
    special = ["[PAD]", "[UNK]", "<s>", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=768,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "pyramid"
    torch.manual_seed(1)
    config = MSPLoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_weights=False)
    config.task_type = "CAUSAL_LM"  # type: ignore[assignment]
    get_peft_model(AutoModelForCausalLM.from_pretrained(str(llama)), config).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(llama)).save_pretrained(str(folder))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")

    def questions(subject: str, count: int) -> list[dict[str, Any]]:
        return [
            {
                "subject": subject,
                "question": f"what is the sum {WORDS[4 + index % 5]} {WORDS[4 + index % 3]} ?",
                "choices": ["one", "two", "0", "1"],
                "answer": (0, 1, 1, 2, 2, 2, 2, 3)[index % 8],
            }
            for index in range(count)
        ]

    subjects = ("hard_sums", "sums")
    write(folder / "mmlu" / "test.parquet", [row for name in subjects for row in questions(name, 8)])
    write(folder / "mmlu" / "dev.parquet", [row for name in subjects for row in questions(name, 5)])
    inputs = [{"task": "count", "input": f"the {word} {{%", "target": "one"} for word in WORDS[4:9]]
    write(folder / "bbh" / "test.parquet", inputs)
    prompt = "canary\n-----\nCount {{ braces }}.\n\nQ: the sum\nA: Let's think step by step.\nSo the answer is one."
    write(folder / "bbh" / "cot_prompts.parquet", [{"task": "count", "prompt": prompt}])
    passages = [
        {"passage": f"the sum is {word} .", "question": "what is the sum ?", "answers": [word, "0"]}
        for word in ("one", "two", "1", "2", "0", "A")
    ]
    write(folder / "drop" / "validation.parquet", passages)
    programs = [
        {
            "task_id": f"HumanEval/{index}",
            "prompt": f"def f{index}():\n    return {index}\n",
            "entry_point": f"f{index}",
            "test": f"def check(f):\n    assert f() == {index if index else 7}\n",
        }
        for index in range(2)
    ]
    write(folder / "humaneval" / "test.parquet", programs)
    return folder


def test_stock_lm_eval_gives_the_same_numbers(adapter: Path, llama: Path, data: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ziggurat.host.folder import load_adapter, load_base

    model = load_adapter(adapter, load_base(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    tasks = tmp_path / "tasks"
    ours = {one.task: one for one in evaluate(model, tokenizer, ["mmlu", "drop", "bbh"], data=data, keep=tasks)}
    assert {name: one.rows for name, one in ours.items()} == {"mmlu": 16, "drop": 6, "bbh": 5}
    assert {name: one.shots for name, one in ours.items()} == {"mmlu": 5, "drop": 3, "bbh": 3}

    plain = export(adapter, tmp_path / "plain").folder
    stock: Any = lm_eval.simple_evaluate
    found = stock(
        model="hf",
        model_args={"pretrained": str(llama), "peft": str(plain), "dtype": "float32"},
        tasks=[PREFIX + name for name in ours],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
    )
    groups = {**found["results"], **found["groups"]}
    assert ours["mmlu"].scores["acc"] == pytest.approx(100 * groups[f"{PREFIX}mmlu"]["acc,none"])
    assert ours["drop"].scores["f1"] == pytest.approx(100 * groups[f"{PREFIX}drop"]["f1,none"])
    bbh = groups[f"{PREFIX}bbh"]["exact_match,get-answer"]
    assert ours["bbh"].scores["exact_match"] == pytest.approx(100 * bbh)
    # And the number says something: the base model without the adapter scores otherwise.
    base = evaluate(AutoModelForCausalLM.from_pretrained(str(llama)), tokenizer, ["mmlu"], data=data)[0]
    assert base.scores["acc"] != ours["mmlu"].scores["acc"]


def test_the_prompts_are_the_papers(data: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    names = write_tasks(["mmlu", "bbh"], data, tmp_path)
    assert names == {"mmlu": "ziggurat_mmlu", "bbh": "ziggurat_bbh"}
    manager: Any = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tasks = manager.load(["ziggurat_mmlu_sums", "ziggurat_bbh_count"])["tasks"]
    mmlu = tasks["ziggurat_mmlu_sums"]
    text = mmlu.fewshot_context(next(iter(mmlu.test_docs())), 5)
    assert text.startswith("The following are multiple choice questions (with answers) about sums.")
    assert text.count("Answer:") == 6 and text.endswith("Answer:") and "A. one\nB. two\nC. 0\nD. 1" in text
    bbh = tasks["ziggurat_bbh_count"]
    text = bbh.fewshot_context(next(iter(bbh.test_docs())), 0)
    assert "canary" not in text and text.startswith("Count {{ braces }}.")
    assert text.endswith("Q: the 0 {%\nA: Let's think step by step.\n")


def test_humaneval_needs_the_flag_and_judges_what_was_written(llama: Path, data: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(llama)), AutoTokenizer.from_pretrained(str(llama))
    with pytest.raises(RecipeError, match="runs code that the model writes; say --run-generated-code"):
        evaluate(model, tokenizer, ["humaneval"], data=data)

    # A model that ends its answer at once: the prompts' own bodies are judged, one wrong, one right.
    model.generation_config.eos_token_id = 3
    model.generation_config.suppress_tokens = [i for i in range(model.config.vocab_size) if i != 3]
    found = evaluate(model, tokenizer, ["humaneval"], data=data, run_code=True)[0]
    assert found.scores == {"pass@1": 50.0} and found.rows == 2
    assert found.notes == ["HumanEval/0: AssertionError"]


def test_files_that_are_missing_or_wrong(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        write_tasks(["drop"], tmp_path, tmp_path / "tasks")
    write(tmp_path / "drop" / "validation.parquet", [{"passage": "x", "question": "y"}])
    with pytest.raises(DataError, match="no column 'answers'"):
        write_tasks(["drop"], tmp_path, tmp_path / "tasks")
    write(tmp_path / "bbh" / "test.parquet", [{"task": "other", "input": "x", "target": "y"}])
    write(tmp_path / "bbh" / "cot_prompts.parquet", [{"task": "count", "prompt": "x"}])
    with pytest.raises(DataError, match="has no prompt of other"):
        write_tasks(["bbh"], tmp_path, tmp_path / "tasks")


def test_the_command(adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ziggurat import cli

    out = tmp_path / "scores.json"
    words = ["ziggurat", "eval", str(adapter), "--tasks", "mmlu", "--data", str(data), "--limit", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    written = json.loads(out.read_text())["scores"]["mmlu"]
    assert written["rows"] == 4 and f"mmlu: acc {written['acc']:.2f} (4 rows)" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ziggurat", "eval", str(adapter), "--tasks", "humaneval"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "--run-generated-code" in capsys.readouterr().err
