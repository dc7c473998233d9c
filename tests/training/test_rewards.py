"""Rewards: built in and one's own, where their code may come from, and TRL's trainers on them."""

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from stops import StopAt
from training_tables import tiny_recipe, write_jsonl
from transformers import AutoConfig, AutoTokenizer

from commands import main
from ziggurat.errors import ConfigError, DataError, RecipeError, RewardError
from ziggurat.recipe.recipe import load_recipe, make_recipe
from ziggurat.recipe.schema import Recipe
from ziggurat.training.answers.predict import predict
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.callbacks.progress import rewards_of
from ziggurat.training.data.examples import Examples, load_examples
from ziggurat.training.data.prompts import fitting_prompts
from ziggurat.training.loop.report import report
from ziggurat.training.loop.rewards import BUILT_IN, Reward, checked, from_words, settle_rewards
from ziggurat.training.loop.run import train

WORDS = ("film", "story", "actor", "scene", "music", "plot", "sky", "grass", "one", "two")
OWN = """
def often(completions, answer):
    return [sum(word in right for word in completion.split()) / 4 for completion, right in zip(completions, answer)]

def short(completion_ids, **rest):
    return [1 - len(ids) / 4 for ids in completion_ids]

def broken(completions):
    return [
        {}["no such key"]
        for completion in completions
    ]
"""


def prompts(folder: Path) -> Path:
    rows = [
        {"prompt": f"say the {word} is", "answer": "good great fine lovely", "place": n} for n, word in enumerate(WORDS)
    ]
    return write_jsonl(folder / "prompts.jsonl", rows)  # type: ignore[arg-type]


def write_rewards(folder: Path) -> Path:
    (folder / "own_rewards.py").write_text(OWN)
    return folder / "own_rewards.py"


def recipe(**more: Any) -> Recipe:
    values = {"model": "m", "task": "grpo", "method.name": "lora", "data.train": "prompts.jsonl"}
    return make_recipe({**values, **{key.replace("__", "."): value for key, value in more.items()}})


def run(model: Path, folder: Path, name: str = "out", **more: Any) -> Recipe:
    short = {"task": "grpo", "train__batch": 16, "sampling__completions": 4, "sampling__tokens": 4}
    short |= {"data__validation_rows": 2, "method__target_modules": "all-linear"}
    return tiny_recipe(model, prompts(folder), folder / name, **{**short, **more})


def built_in(name: str, texts: Sequence[Any], **more: Any) -> list[float]:
    columns = {key: value for key, value in more.items() if not key.startswith("rewards__")}
    made = recipe(**{key: value for key, value in more.items() if key.startswith("rewards__")})
    return checked(name, partial(BUILT_IN[name], made.rewards))(
        completions=texts, prompts=["?"] * len(texts), **columns
    )


def test_built_in_rewards() -> None:
    assert built_in("exact", [" 7\n", "7.0", "seven"], answer=[7, 7, "seven"], settings=["a", "b", "c"]) == [1, 0, 1]
    assert built_in("exact", ["4", "2.5", "4.0"], answer=[4.0, 2.5, 4.0]) == [1, 1, 1]
    texts = ["3 + 4 = 7.", "It is 1,234.50", "-2", "none", "x7"]
    right = ["so #### 7", 1234.5, -2, "none", "8"]
    assert built_in("last_number", texts, total=right, rewards__answer="total") == [1, 1, 1, 0, 0]
    assert built_in("regex", ["a 12", "b"], rewards__pattern=r"\d{2}$") == [1, 0]
    assert built_in("json", ['{"a": [1]}', "{a: 1}", "", "[" * 100_000, "NaN"]) == [1, 0, 0, 0, 0]
    assert built_in("length", ["abcd", "abcdefgh", ""], rewards__most=4) == [1, 0.5, 1]
    chat = [[{"role": "assistant", "content": "It is 7"}]]
    assert built_in("last_number", chat, answer=["7"]) == [1]


def test_what_a_reward_function_returns_is_checked() -> None:
    asked: dict[str, Any] = {
        "prompts": ["a", "b"],
        "completions": ["x", "y"],
        "completion_ids": [[1], [2]],
        "mark": [3, 4],
    }

    def says(returned: Any) -> Reward:
        return checked("mine", lambda completions: returned)

    assert says([1, None])(**asked) == [1.0, None]
    for returned, words in (
        ([1.0], "for each of 2 completions, and returned 1$"),
        (5, "and returned 5$"),
        ("ab", "and returned 'ab'$"),
        ([1.0, math.nan], "and returned nan for 'y'"),
        ([1.0, "good"], "and returned 'good' for 'y'"),
    ):
        with pytest.raises(RewardError, match=rf"the reward 'mine' has to return a number, or None.*{words}"):
            says(returned)(**asked)

    def wrong(completions: list[str], mark: list[int]) -> list[float]:
        return [len(completion) / (place - 3) for completion, place in zip(completions, mark, strict=True)]

    where = wrong.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"'wrong' ended in ZeroDivisionError in line {where}: .*the first is 'x'"):
        checked("wrong", wrong)(**asked)
    with pytest.raises(RewardError, match=r"missing 1 required .*'mrk'; .* it can get prompts, .*, mark$"):
        checked("typo", lambda completions, mrk: [0, 0])(**asked)

    def ends(completions: list[str]) -> list[float]:
        sys.exit(5)

    with pytest.raises(RewardError, match=r"'ends' ended in SystemExit in line \d+: 5"):
        checked("ends", ends)(**asked)

    async def later(completions: list[str], **rest: Any) -> list[int]:
        return [len(rest["mark"]) for _ in completions]

    assert asyncio.run(checked("later", later)(**asked)) == [2.0, 2.0]


def test_a_name_in_a_recipe_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rewards(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("often", "own_rewards.py:often", "own_rewards:often", "os:system"):
        with pytest.raises(
            RecipeError, match=rf"'{name}' is none of exact, .*bring its code by --reward FILE.py:{name}"
        ):
            settle_rewards(recipe(rewards__functions=[name]), [])


def test_an_installed_package_brings_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rewards(tmp_path)
    info = tmp_path / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    lines = ("[ziggurat.rewards]", "often = own_rewards:often", "gone = own_rewards:gone")
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    settled, functions = settle_rewards(recipe(rewards__functions=["often", "exact"]), [])
    assert functions["often"](completions=["good bad"], answer=["good"]) == [0.25]
    assert settled.rewards.functions == ["often", "exact"]
    with pytest.raises(RecipeError, match="'gone' of own_rewards:gone: AttributeError"):
        settle_rewards(recipe(rewards__functions=["gone"]), [])


def test_what_cannot_be_rewarded_is_said_at_once(tmp_path: Path) -> None:
    def exact(completions: list[str]) -> list[float]:
        return []

    wrong = {"rewards__functions": ["regex", "length"], "rewards__weights": [1.0], "train__batch": 12}
    with pytest.raises(RecipeError) as error:
        settle_rewards(recipe(**wrong, method__lora_dropout=0.1), [exact])
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "--reward", "rewards.pattern", "rewards.most", "rewards.weights", "method.lora_dropout", "train.batch",
    ]  # fmt: skip
    with pytest.raises(RecipeError) as error:
        settle_rewards(
            recipe(rewards__functions=["json"], rewards__pattern="a", rewards__answer="b", rewards__most=3), []
        )
    assert [line.partition(";")[0] for line in str(error.value).splitlines()] == [
        "rewards.answer: only exact and last_number read it", "rewards.pattern: only regex reads it",
        "rewards.most: only length reads it",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="nothing is rewarded"):
        settle_rewards(recipe(), [])
    with pytest.raises(RecipeError, match="no regular expression"):
        settle_rewards(recipe(rewards__functions=["regex"], rewards__pattern="("), [])
    with pytest.raises(RecipeError, match="has no meaning with task: instruct"):
        settle_rewards(recipe(task="instruct"), [exact])
    with pytest.raises(RecipeError, match=r"rewards.functions: has no meaning with task: instruct"):
        recipe(task="instruct", rewards__functions=["exact"])
    for word, says in (
        ("own.py", "a file or a module"),
        (f"{write_rewards(tmp_path)}:gone", "has no function called gone"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_words([word])


def test_vllm_takes_what_can_be_merged() -> None:
    with pytest.raises(RecipeError, match="LoR2C can't be merged; leave the key out, or take one of"):
        recipe(method__name="lor2c", sampling__vllm="colocate")
    assert recipe(method__name="msplora", sampling__vllm="server").sampling.vllm == "server"
    options = {"sampling__vllm": "server", "sampling__vllm_options": {"server_base_ulr": "http://localhost:8000"}}
    with pytest.raises(RecipeError, match=r"server_base_ulr is unknown, did you mean server_base_url\?"):
        settle_rewards(recipe(**options, rewards__functions=["json"]), [])


def read(folder: Path, *rows: dict[str, Any], **more: Any) -> Examples:
    data = str(write_jsonl(folder / "a.jsonl", list(rows)))
    return load_examples(recipe(data__train=data, data__validation=data, **more))


def test_prompts_in_their_forms(tmp_path: Path) -> None:
    user = {"role": "user", "content": "what"}
    chat = read(tmp_path, {"messages": [user, {"role": "assistant", "content": "so"}], "total": 7})
    assert chat.shape == "messages" and json.loads(chat.train[0]["prompt"]) == [user] and chat.train[0]["total"] == 7
    texts = read(tmp_path, {"question": "what", "system": "be kind", "total": 7}, data__as_chat=True)
    assert json.loads(texts.train[0]["prompt"]) == [{"role": "system", "content": "be kind"}, user]
    alpaca = read(tmp_path, {"instruction": "add", "input": "3 and 4", "total": 7})
    assert alpaca.shape == "alpaca" and "### Input:\n3 and 4" in alpaca.train[0]["prompt"]
    plain = read(tmp_path, {"prompt": "what", "completion": "so", "total": 7})
    assert plain.shape == "prompt" and sorted(plain.train.column_names) == ["prompt", "total"]
    assert plain.notes[0].endswith(
        "column 'completion' doesn't reach reward functions, which get the model's own; rename it"
    )


def test_prompts_that_cannot_be_asked(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(DataError, match="needs prompt, messages or instruction"):
        read(tmp_path, {"text": "what"})
    with pytest.raises(DataError, match="row 2: the prompt is empty"):
        read(tmp_path, {"prompt": "what"}, {"prompt": " "})
    for gap in (None, " "):
        with pytest.raises(DataError, match="row 2: column 'answer' holds no right answer"):
            read(tmp_path, *({"prompt": "a", "answer": answer} for answer in ("1", gap)), rewards__functions=["exact"])
    with pytest.raises(DataError, match="reward functions get something else as prompts"):
        read(tmp_path, {"prompt": "what", "prompts": 1})
    with pytest.raises(DataError, match=r"'answer', and that column isn't there; .*: total$"):
        read(tmp_path, {"prompt": "what", "total": 1}, rewards__functions=["exact"])
    for column in ("prompt", "question"):
        with pytest.raises(
            DataError, match=rf"compares with column '{column}', which is part of the prompt; .*: total$"
        ):
            read(tmp_path, {"question": "what", "total": 1}, rewards__functions=["exact"], rewards__answer=column)
    tokenizer, config = AutoTokenizer.from_pretrained(str(tiny_llama)), AutoConfig.from_pretrained(str(tiny_llama))
    examples = read(tmp_path, {"prompt": "say"}, {"prompt": "say " * 61})
    rows, _, notes = fitting_prompts(recipe(sampling__tokens=4), tokenizer, config, examples)
    assert len(rows) == 1 and notes[1] == "1 of 2 training prompts have more than 60 tokens and are left out"
    with pytest.raises(DataError, match=r"sampling.tokens: 64, and m takes 64 with the prompt"):
        fitting_prompts(recipe(sampling__tokens=64), tokenizer, config, examples)
    longer = read(tmp_path, {"prompt": "say say say say"}, {"prompt": "say say say"})
    with pytest.raises(DataError, match=r"sampling.tokens: 63 of the 64 positions of m leave 1 .* tokens; lower it"):
        fitting_prompts(recipe(sampling__tokens=63), tokenizer, config, longer)
    with pytest.raises(DataError, match=r"data.max_length: 1, and the shortest .* raise it"):
        fitting_prompts(recipe(sampling__tokens=4, data__max_length=1), tokenizer, config, longer)


def test_grpo_raises_the_reward_and_goes_on_bitwise(tiny_llama: Path, tmp_path: Path) -> None:
    """From the command: two functions of one's own with weights; stopped and resumed in the second epoch."""
    more = {"train__max_steps": 8, "rewards__weights": [1.0, -0.1], "train__lr": 0.03}
    flags = [f"--reward={write_rewards(tmp_path)}:{name}" for name in ("often", "short")]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(_plain(run(tiny_llama, tmp_path, **more))))
    assert main("train", str(tmp_path / "mine.yaml"), *flags) == 0
    info = json.loads((tmp_path / "out" / "run.json").read_text())
    assert info["after"]["reward"] > info["before"]["reward"] + 0.2
    assert info["after"]["reward"] == pytest.approx(info["after"]["often"] - 0.1 * info["after"]["short"])
    steps = [line for line in info["history"] if "reward" in line]
    assert len(steps) == 8 and {"reward_std", "frac_reward_zero_std", "completions/mean_length"} <= set(steps[0])
    lines = [json.loads(line) for line in (tmp_path / "out" / "logs" / "completions.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 0, *(step for step in range(8) for _ in range(8)), 8, 8]
    assert lines[0]["part"] == "validation" and set(lines[0]["rewards"]) == {"often", "short"}

    functions = from_words([f"{tmp_path / 'own_rewards.py'}:{name}" for name in ("often", "short")])
    again = run(tiny_llama, tmp_path, "again", **more)
    with pytest.raises(Interrupted, match="stopped at step 3 of 8"):
        train(again, rewards=functions, callbacks=[StopAt(3)])
    with pytest.raises(RecipeError, match=r"rewards.functions: nothing is rewarded"):
        train(again.model_copy(update={"resume": True}))
    result = train(again.model_copy(update={"resume": True}), rewards=functions)
    for name in ("adapter_model.safetensors", "logs/completions.jsonl"):
        assert (result.folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert "often" in yaml.safe_load((result.folder / "recipe.yaml").read_text())["rewards.functions"]
    with pytest.raises(RecipeError, match=r"'often' is none of .*--reward FILE.py:often"):
        train(load_recipe(result.folder, [f"output={tmp_path / 'third'}"]))
    assert isinstance(predict(result.folder, ["say the film is"], max_new_tokens=1)[0].answer, str)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(again, result))
    for part in ("reward before (of the likeliest completions)", "first step", "of groups without signal"):
        assert part in console.export_text(clear=False), part


def _plain(made: Recipe) -> dict[str, Any]:
    from ziggurat.recipe.recipe import resolved

    return resolved(made)


def test_rewards_that_are_all_the_same_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    def same(completions: list[str]) -> list[float]:
        return [0.5] * len(completions)

    made = run(tiny_llama, tmp_path, train__max_steps=10, sampling__temperature=0.3, train__evaluate_before=False)
    made = made.model_copy(update={"train": made.train.model_copy(update={"batch": 4})})
    noted = [note for note in train(made, rewards=[same]).notes if "nothing is learned" in note]
    assert len(noted) == 1 and noted[0].startswith(
        "step 10 of 10: in each of the last 10 steps all completions of a prompt had the same reward (0.50 on average)"
    )
    assert "are cut at sampling.tokens 4: raise it; sampling.temperature 0.3 draws" in noted[0]


def test_rewards_of_none_alone_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    def nothing(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    made = run(tiny_llama, tmp_path, train__max_steps=10, train__evaluate_before=False, train__batch=4)
    told = [note for note in train(made, rewards=[nothing]).notes if "nothing is learned" in note]
    assert len(told) == 1 and "every reward function returned None for every completion" in told[0]
    for missing in (None, math.nan):
        assert rewards_of({"reward": missing, "frac_reward_zero_std": 0.0}) == "no reward for any completion"


def test_a_reward_that_fails_ends_the_run(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(_plain(run(tiny_llama, tmp_path, train__max_steps=2))))
    assert main("train", str(tmp_path / "mine.yaml"), "--reward", f"{write_rewards(tmp_path)}:broken") == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "error: the reward 'broken' ended in KeyError in line 10: 'no such key'" in printed
    assert not (tmp_path / "out").exists()


def test_rloo_is_held_near_its_start(tiny_llama: Path, tmp_path: Path) -> None:
    more = {"task": "rloo", "rewards__beta": 0.1, "rewards__functions": ["length"], "rewards__most": 9}
    chat = {"data__as_chat": True, "train__evaluate_before": False, "train__accumulate": 2, "train__batch": 4}
    result = train(run(tiny_llama, tmp_path, train__max_steps=3, **more, **chat))
    kl = [line["kl"] for line in result.history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-5
    assert not (result.folder / "ref").exists() and result.shape == "messages"
    assert isinstance(predict(result.folder, ["say"], max_new_tokens=1)[0].answer, str)
    with pytest.raises(RecipeError, match=r"rewards.beta: pissa starts from other base weights"):
        train(run(tiny_llama, tmp_path, "other", **more, **chat, train__max_steps=1, method__name="pissa"))
    with pytest.raises(RecipeError, match=r"rewards.beta: the reference is the model without its adapter, and full"):
        train(run(tiny_llama, tmp_path, "whole", **more, method__name="full", method__r=None,
                  method__target_modules=None))  # fmt: skip
