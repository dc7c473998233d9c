"""Reward functions: built-in ones, the user's, and checks of their results."""

import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from ziggurat.errors import ConfigError, RecipeError, RewardError, first_line, line_in
from ziggurat.nearest import did_you_mean
from ziggurat.recipe.methods import METHODS
from ziggurat.recipe.schema import Recipe, RewardsPart
from ziggurat.recipe.tasks import REWARDED

from ..devices.processes import launched_size

#: TRL's form: a function of the keywords prompts, completions, completion_ids and the data's columns that returns a
#: number, or None, for each completion.
Reward = Callable[..., Any]

#: The entry point group for reward functions of installed packages.
GROUP = "ziggurat.rewards"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def _exact(text: str, answer: str, settings: RewardsPart) -> float:
    """1 where the completion is the right answer, apart from surrounding blanks."""
    return float(text.strip() == answer.strip())


def _last_number(text: str, answer: str, settings: RewardsPart) -> float:
    """1 where the last number of the completion is the last number of the right answer."""
    return float(_last(text) == _last(answer) is not None)


def _regex(text: str, answer: str, settings: RewardsPart) -> float:
    """1 where the pattern is found in the completion."""
    return float(re.search(str(settings.pattern), text) is not None)


def _json(text: str, answer: str, settings: RewardsPart) -> float:
    """1 where the completion is JSON and nothing else."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _length(text: str, answer: str, settings: RewardsPart) -> float:
    """1 up to `rewards.most` characters, and most / n for n characters beyond."""
    return min(1.0, (settings.most or 1) / max(1, len(text)))


def _of_texts(score: Callable[[str, str, RewardsPart], float]) -> Callable[..., list[float]]:
    """A reward function that scores each completion's text, with the right answer if there is one."""

    def rewards(settings: RewardsPart, /, completions: Sequence[Any], **columns: Any) -> list[float]:
        answers = columns.get(settings.answer, [""] * len(completions))
        return [
            max(score(text_of(text), answer, settings) for answer in _texts(right))
            for text, right in zip(completions, answers, strict=True)
        ]

    return rewards


def _texts(answer: Any) -> tuple[str, ...]:
    """A right answer as a text. A column of numbers is read as decimal ones if one of them is: 4.0 may be a 4."""
    whole = isinstance(answer, float) and answer.is_integer()
    return (str(answer), str(int(answer))) if whole else (str(answer),)


#: Built-in rewards; the first argument of each is the recipe's `rewards.*`.
BUILT_IN: dict[str, Callable[..., list[float]]] = {
    "exact": _of_texts(_exact),
    "last_number": _of_texts(_last_number),
    "regex": _of_texts(_regex),
    "json": _of_texts(_json),
    "length": _of_texts(_length),
}


def text_of(completion: Any) -> str:
    """The text of a completion, which is a list of messages if the prompt is one."""
    return completion if isinstance(completion, str) else "".join(str(part.get("content") or "") for part in completion)


def _last(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is Python's, not JSON's")


def from_words(words: Iterable[str]) -> list[Reward]:
    """The functions that `--reward FILE:NAME` names; their code runs.

    Raises:
        ConfigError: a word has no name, its file can't be run, or holds no such function.
    """
    from ziggurat.host.plugins import module_of

    functions = []
    for word in words:
        source, _, name = word.rpartition(":")
        if not source or not name.isidentifier():
            raise ConfigError(f"--reward {word}: a file or a module, and a function in it, as in rewards.py:correct")
        function = getattr(module_of(source, "--reward"), name, None)
        if not callable(function):
            raise ConfigError(f"--reward {word}: {source} has no function called {name}")
        functions.append(function)
    return functions


def settle_rewards(recipe: Recipe, user_rewards: Sequence[Reward]) -> tuple[Recipe, dict[str, Reward]]:
    """The recipe with all of its rewards, and the functions by name: those that it names, then `user_rewards`.

    Code comes from `user_rewards` and installed packages alone. Raises RecipeError that lists all mistakes.
    """
    if recipe.task not in REWARDED:
        if user_rewards:
            raise RecipeError(
                f"--reward: has no meaning with task: {recipe.task}; it goes with {' and '.join(REWARDED)}"
            )
        return recipe, {}
    problems: list[str] = []
    by_name = {name_of(function): function for function in user_rewards}
    problems += [
        f"--reward: '{name}' is the name of a built-in reward; rename it" for name in by_name if name in BUILT_IN
    ]
    if len(by_name) < len(user_rewards):
        problems.append(f"--reward: two functions have one name: {', '.join(map(name_of, user_rewards))}; rename one")
    names = list(dict.fromkeys([*(recipe.rewards.functions or ()), *by_name]))
    functions: dict[str, Reward] = {}
    for name in names:
        if name in BUILT_IN:
            problems += _needs(recipe, name)
            functions[name] = partial(BUILT_IN[name], recipe.rewards)
        elif (function := by_name.get(name) or _installed(name)) is not None:
            functions[name] = function
        else:
            problems.append(
                f"rewards.functions: '{name}' is none of {', '.join(BUILT_IN)}, and a recipe can only name a function: "
                f"bring its code by --reward FILE.py:{name}, or by a package with an entry point in '{GROUP}'"
            )
    if not names:
        problems.append(
            f"rewards.functions: nothing is rewarded; name {', '.join(BUILT_IN)}, or give --reward FILE:NAME"
        )
    problems += _unread(recipe.rewards, names)
    weights = recipe.rewards.weights
    if weights is not None and len(weights) != len(names):
        problems.append(f"rewards.weights: {len(weights)} for {len(names)} rewards: {', '.join(names)}")
    problems += _sampling_problems(recipe)
    if problems:
        raise RecipeError("\n".join(problems))
    rewards = recipe.rewards.model_copy(update={"functions": names})
    return recipe.model_copy(update={"rewards": rewards}), {name: checked(name, f) for name, f in functions.items()}


def _sampling_problems(recipe: Recipe) -> list[str]:
    from trl import GRPOConfig, RLOOConfig

    problems, group, method = [], recipe.sampling.completions, recipe.method["name"]
    if recipe.rewards.beta and METHODS[method].config is None:
        problems.append(
            f"rewards.beta: the reference is the model without its adapter, and {method} has none; leave the key out"
        )
    problems += drawing_problems(recipe, GRPOConfig if recipe.task == "grpo" else RLOOConfig)
    drawn = recipe.train.batch * recipe.train.accumulate * launched_size()
    if drawn % group:
        problems.append(
            f"train.batch: with train.accumulate and all processes a step takes {drawn} completions, no multiple "
            f"of sampling.completions {group}; {drawn // group * group or group} is one"
        )
    return problems


def drawing_problems(recipe: Recipe, config: Any) -> list[str]:
    """Settings of a recipe that don't work with drawn completions, or with this config class of TRL."""
    problems = [
        f"method.{key}: {value} would draw completions from another model than the one that learns; leave it out"
        for key, value in recipe.method.items()
        if key.endswith("dropout") and value
    ]
    options = [field.name.removeprefix("vllm_") for field in fields(config) if field.name.startswith("vllm_")]
    for name in recipe.sampling.vllm_options or {}:
        if name not in options or name == "mode":
            hint = did_you_mean(name, options) or f"; TRL's are {', '.join(options)}"
            problems.append(f"sampling.vllm_options: {name} is unknown{hint}")
    return problems


def name_of(function: Reward) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _installed(name: str) -> Reward | None:
    """The installed package's function of this name. Raises RecipeError if it can't be imported."""
    for entry in entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except Exception as error:
            raise RecipeError(
                f"rewards.functions: '{name}' of {entry.value}: {type(error).__name__}: {first_line(error)}"
            ) from error
    return None


def _needs(recipe: Recipe, name: str) -> list[str]:
    """Missing settings of a built-in reward."""
    if name == "length" and recipe.rewards.most is None:
        return ["rewards.most: missing: the characters that length allows"]
    if name == "regex":
        if recipe.rewards.pattern is None:
            return ["rewards.pattern: missing: the regular expression that regex looks for"]
        try:
            re.compile(recipe.rewards.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return [f"rewards.pattern: no regular expression: {error}"]
    return []


def _unread(settings: RewardsPart, names: Collection[str]) -> list[str]:
    """Settings that none of the named rewards reads."""
    readers = {"answer": ("exact", "last_number"), "pattern": ("regex",), "most": ("length",)}
    return [
        f"rewards.{key}: only {' and '.join(of)} {'read' if len(of) > 1 else 'reads'} it; name one of them in "
        "rewards.functions, or leave the key out"
        for key, of in readers.items()
        if getattr(settings, key) != RewardsPart.model_fields[key].default and not set(of).intersection(names)
    ]


def checked(name: str, function: Reward) -> Reward:
    """`function` for TRL: it gets the keywords that it names, and its result is checked (RewardError)."""

    async def awaited(**keywords: Any) -> list[float | None]:
        with _told_of_errors(name, function, keywords):
            values = await function(**_accepted(function, keywords))
        return _numbers(name, values, keywords["completions"])

    def called(**keywords: Any) -> list[float | None]:
        with _told_of_errors(name, function, keywords):
            values = function(**_accepted(function, keywords))
        return _numbers(name, values, keywords["completions"])

    reward = awaited if inspect.iscoroutinefunction(function) else called
    reward.__name__ = name
    return reward


def _accepted(function: Reward, keywords: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(keywords)
    return {name: value for name, value in keywords.items() if name in parameters}


@contextmanager
def _told_of_errors(name: str, function: Reward, keywords: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of a reward function in the block into RewardError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        where = f"{type(error).__name__}{line_in(function, error)}"
        raise RewardError(
            f"the reward '{name}' ended in {where}: {first_line(error)}; it was called with "
            f"{len(keywords['completions'])} completions, the first is {text_of(keywords['completions'][0])[:80]!r}; "
            f"it can get {', '.join(keywords)}"
        ) from error


def _numbers(name: str, values: Any, completions: Sequence[Any]) -> list[float | None]:
    """The result of a reward function as numbers. Raises RewardError."""
    requirement = f"the reward '{name}' has to return a number, or None, for each of {len(completions)} completions"
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise RewardError(f"{requirement}, and returned {values!r:.80}")
    values = list(values)
    if len(values) != len(completions):
        raise RewardError(f"{requirement}, and returned {len(values)}")
    numbers = []
    for value, completion in zip(values, completions, strict=True):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise RewardError(f"{requirement}, and returned {value!r} for {text_of(completion)[:80]!r}")
        numbers.append(number)
    return numbers
