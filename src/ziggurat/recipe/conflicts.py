"""Mistakes that concern several keys of a recipe."""

from collections.abc import Iterator, Sequence
from typing import Any

from ziggurat.host.method import has_pairs
from ziggurat.nearest import did_you_mean

from .glue import brings_validation
from .methods import METHODS
from .schema import keys
from .tasks import REWARDED, TASKS


def _of(*rows: str) -> tuple[str, ...]:
    """The tasks whose data have one of these forms."""
    return tuple(name for name, task in TASKS.items() if task.rows in rows)


_CLASSES = ("classification", "multilabel")
#: Keys, or sections, that apply to some tasks only.
_GOES_WITH = {
    ("data.format", "data.loss", "data.packing", "data.streaming", "data.image_folder", "tower"): _of("answers"),
    ("data.prefix", "data.max_target"): _of("sources"),
    ("train.answers",): _of("answers", "sources"),
    ("data.as_chat",): _of("answers", "pairs", "judged", "prompts"),
    ("train.beta",): ("dpo", "orpo", "kto"),
    ("rewards.", "sampling.completions"): REWARDED,
    ("sampling.",): _of("prompts"),
    ("teacher.",): ("distill",),
    ("data.label",): _of("labelled", "judged"),
    ("data.text", "data.text_pair", "head.pooling", "head.dropout"): _of("labelled"),
    ("head.lr",): _of("labelled", "tagged"),
    ("data.label_names",): (*_CLASSES, "tokens"),
    ("data.similar_labels",): _CLASSES,
    ("data.label_separator",): ("multilabel",),
    ("train.class_weights",): ("classification",),
}


def tasks_of(key: str) -> tuple[str, ...]:
    """The tasks that a key goes with, or a section, as `rewards.`."""
    section = key[: key.find(".") + 1]
    return next((tasks for keys, tasks in _GOES_WITH.items() if key in keys or section in keys), tuple(TASKS))


class _Recipe:
    """The valid keys of a recipe, and the defaults of the others."""

    def __init__(self, good: dict[str, Any]) -> None:
        self.keys = list(good)
        self._good, self._known = good, keys()

    def default(self, key: str) -> Any:
        return self._known[key].get_default(call_default_factory=True)

    def __getitem__(self, key: str) -> Any:
        return self._good.get(key, self.default(key))

    def changes(self, key: str) -> bool:
        """Whether the recipe gives the key another value than its default."""
        return key in self._good and self._good[key] != self.default(key)


def conflicts(good: dict[str, Any]) -> list[str]:
    """Conflicts between valid keys; invalid keys are ignored."""
    recipe = _Recipe(good)
    return [*_of_task(recipe), *_of_data(recipe), *_of_run(recipe)]


def _of_task(recipe: _Recipe) -> Iterator[str]:
    task, metric = recipe["task"], recipe["metric"]
    for key in recipe.keys:
        if task not in tasks_of(key) and recipe.changes(key):
            yield f"{key}: has no meaning with task: {task}"
    if task == "distill" and recipe["teacher.model"] is None:
        yield f"teacher.model: missing: {keys()['teacher.model'].description}"
    metrics = TASKS[task].metrics
    if metric is not None and metric not in metrics:
        yield f"metric: {metric} does not go with task: {task}; one of {', '.join(metrics)}"


def _of_data(recipe: _Recipe) -> Iterator[str]:
    weights, train = recipe["data.weights"], recipe["data.train"]
    files, validates = 1 + len(recipe["data.more"] or []), brings_validation(train, recipe["data.folder"])
    if weights is not None and len(weights) != files:
        yield f"data.weights: {len(weights)} for {files} files; data.train names the files as a list"
    if files > 1 and validates:
        yield f"data.more: has no meaning with {train}, a task of GLUE"
    if recipe.changes("data.validation_share") and "data.validation_rows" in recipe.keys:
        yield "data.validation_rows: given beside data.validation_share; keep one"
    if recipe["data.validation"] is not None or recipe["data.validation_split"] is not None:
        for key in ("data.validation_share", "data.validation_rows"):
            if recipe.changes(key):
                yield f"{key}: has no meaning where validation data are named"
    elif recipe.changes("data.validation_share") and validates:
        yield (
            f"data.validation_share: has no meaning with {train}, which has validation data; data.validation_rows "
            "splits a part of the training rows off instead"
        )
    names = recipe["data.label_names"] or []
    if len(set(names)) < len(names):
        yield f"data.label_names: two classes have one name: {', '.join(names)}"


def _of_run(recipe: _Recipe) -> Iterator[str]:
    task, name = recipe["task"], recipe["name"]
    if recipe["head.pooling"] == "model" and recipe.changes("head.dropout"):
        yield "head.dropout: has no meaning with head.pooling: model, whose dropout is the model's own"
    if recipe["train.scheduler"] == "constant" and recipe.changes("train.warmup") and recipe["train.warmup"] != 0:
        yield "train.warmup: has no meaning with train.scheduler: constant; constant_with_warmup has one"
    if recipe["train.best"] and recipe["train.evaluate"] == "never":
        yield "train.best: needs scores to choose by; set train.evaluate to epoch or a number of steps"
    elif recipe["train.best"] and recipe["train.evaluate"] != recipe["train.save"]:
        yield "train.save: must equal train.evaluate when train.best is true"
    if recipe["train.patience"] is not None and not recipe["train.best"]:
        yield "train.patience: needs train.best: true, so that the run ends with its best checkpoint"
    if recipe["adapter"] in METHODS:
        yield f"adapter: is the folder of an adapter to go on from; the method is method.name: {recipe['adapter']}"
    yield from optimizer_problems(recipe["train.optimizer"])
    if TASKS[task].rows == "prompts" and recipe["train.group_by_length"]:
        yield f"train.group_by_length: has no meaning with task: {task}, whose batches are groups of completions"
    if recipe["sampling.vllm"] is None and recipe["sampling.vllm_options"]:
        yield "sampling.vllm_options: has no meaning without sampling.vllm"
    yield from _of_streams(recipe)
    yield from tracker_problems(recipe["train.report_to"] or [])
    if recipe["resume"] and recipe["overwrite"]:
        yield "overwrite: contradicts resume; give one of them"
    if not name.strip() or any(sign in name for sign in "/\\"):
        yield f"name: '{name}' cannot name a folder; use output for a path"


def _of_streams(recipe: _Recipe) -> Iterator[str]:
    """Conflicts of `data.streaming` with other keys."""
    if not recipe["data.streaming"]:
        if recipe.changes("data.shuffle_buffer"):
            yield "data.shuffle_buffer: has no meaning without data.streaming"
        return
    for key in ("data.validation_share", "data.max_train", "train.epochs", "train.group_by_length"):
        if recipe.changes(key):
            yield f"{key}: has no meaning with data.streaming, whose rows are not counted beforehand"
    if recipe["train.max_steps"] is None:
        yield "data.streaming: needs train.max_steps, because the length of a stream isn't known"


def unmerged_with_vllm(good: dict[str, Any], choice: dict[str, Any]) -> list[str]:
    """Conflicts of `sampling.vllm` with a checked `method.*`: TRL sends merged weights to vLLM."""
    from .methods import shown

    method = METHODS[choice["name"]]
    if good.get("sampling.vllm") is None or method.merges or method.four_bits or method.config is None:
        return []
    able = ", ".join(name for name, row in METHODS.items() if row.merges)
    return [
        f"sampling.vllm: TRL merges the adapter into the weights that it sends to vLLM, and {shown(choice['name'])} "
        f"can't be merged; leave the key out, or take one of {able}"
    ]


def unread_spectra(good: dict[str, Any], choice: dict[str, Any]) -> list[str]:
    """The conflict of `spectra` with a checked `method.*` whose adapter analysis can't read."""
    from .methods import method_config, shown

    if good.get("spectra", "never") == "never" or has_pairs(method_config(choice)):
        return []
    return [f"spectra: {shown(choice['name'])} makes no adapter that analysis reads; leave the key out"]


def optimizer_problems(name: str | None) -> list[str]:
    """Mistakes in a recipe's `train.optimizer`, independent of installed packages."""
    if name is None:
        return []
    from transformers.training_args import OptimizerNames

    # The others compress gradients of full weights, which an adapter doesn't have.
    names = [opt.value for opt in OptimizerNames if not any(part in opt.value for part in ("galore", "apollo", "lomo"))]
    if name in names:
        return []
    hint = did_you_mean(name, names, dict.fromkeys(("adam", "adamw"), "adamw_torch"))
    return [f"train.optimizer: '{name}' is no optimiser for adapters{hint}; one of {', '.join(names)}"]


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Mistakes in a recipe's `train.report_to`, independent of installed packages."""
    if not names:
        return []
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as ALLOWED

    unknown = [
        f"train.report_to: '{name}' is no tracker of transformers{did_you_mean(name, ALLOWED)}; "
        f"one of {', '.join(ALLOWED)}, or leave the key out to report nowhere"
        for name in names
        if name not in ALLOWED
    ]
    twice = sorted({name for name in names if list(names).count(name) > 1})
    return unknown + [f"train.report_to: {name} is named twice" for name in twice]
