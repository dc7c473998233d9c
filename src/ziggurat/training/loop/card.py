"""The complete model card of a run, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ziggurat._distribution import VERSION
from ziggurat.host.saved.card import BEGIN
from ziggurat.recipe.embedded import EMBEDDED, HUB_NAME
from ziggurat.recipe.methods import METHODS, shown
from ziggurat.recipe.schema import Recipe

from .metrics import lower_is_better

if TYPE_CHECKING:
    from ..model.base import HeadSpec
    from .result import Result


#: transformers' name of a task's models -> the hub's name of the task.
_PIPELINES = {
    "CausalLM": "text-generation",
    "ImageTextToText": "image-text-to-text",
    "Seq2SeqLM": "text2text-generation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
}


def write_run_card(folder: Path, recipe: Recipe, spec: HeadSpec, result: Result, versions: dict[str, str]) -> None:
    """Write `folder`/README.md; the section on loading, of a ziggurat adapter, stays at its end."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    section = text[text.index(BEGIN) :] if BEGIN in text else _loading(recipe, spec)
    # PEFT's config doesn't have the number of classes.
    guessed, known = ", num_labels=2)  # as many as it was trained with", f", num_labels={spec.num_labels})"
    section = section.replace(guessed, known)
    if spec.images:
        section = section.replace("AutoModel  # or the class for your task", "AutoModelForImageTextToText")
        section = section.replace("= AutoModel.", "= AutoModelForImageTextToText.")
    path.write_text(f"{run_card(recipe, spec, result, versions)}\n{section.rstrip()}\n", encoding="utf-8")


def run_card(recipe: Recipe, spec: HeadSpec, result: Result, versions: dict[str, str]) -> str:
    """Front matter and text: data, rows, scores, settings, cost, versions."""
    base, local = _base(recipe.model)
    name, method = recipe.name, shown(result.method)
    front: dict[str, Any] = {"library_name": "peft" if METHODS[result.method].config else "transformers"}
    if not local:
        front["base_model"] = base
        if front["library_name"] == "peft":
            front["base_model_relation"] = "adapter"
    front["pipeline_tag"] = _PIPELINES[spec.model]
    front["tags"] = ["ziggurat", result.method, recipe.task]
    counts, train = result.counts, recipe.train
    where = f"`{base}`, a model in a folder of the machine that trained" if local else f"[{base}](https://hf.co/{base})"
    rows = "\n".join(_scores(result))
    settings = {key: value for key, value in recipe.method.items() if key != "name"}
    fields = ", ".join(f"{key} {value}" for key, value in settings.items())
    data = recipe.data.train if not Path(recipe.data.train).expanduser().exists() else Path(recipe.data.train).name
    seen = f"{result.rows.get('train', 0):,} rows learned from, {result.rows.get('validation', 0):,} scored on"
    packages = ", ".join(f"{package} {version}" for package, version in versions.items() if package != "machine")
    front_text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"""---
{front_text}---

# {name}

{method} for {recipe.task} on {where}: {counts.adapter:,} trainable parameters{_head(counts.head)}.

| validation rows | before | after | baseline |
|---|--:|--:|--:|
{rows}

## Data

`{data}`: {seen}.

## Training

{method}: {fields or "no settings"}. Learning rate {train.lr:g} ({train.scheduler}), {result.steps:,} steps of
{train.batch * train.accumulate} rows a device, {result.seconds:,.0f} seconds, seed {recipe.seed}; base weights in
{recipe.dtype}.

Ziggurat {VERSION}; {packages}.
"""


def _scores(result: Result) -> list[str]:
    def cell(scores: dict[str, float], name: str) -> str:
        return f"{scores[name]:,.2f}" if name in scores else ""

    lines = []
    for name in result.after:
        low = " (lower is better)" if lower_is_better(name) else ""
        cells = " | ".join(cell(scores, name) for scores in (result.before, result.after, result.guess))
        lines.append(f"| {name}{low} | {cells} |")
    return lines


def _head(parameters: int) -> str:
    return f", and {parameters:,} of the head" if parameters else ""


def _base(model: str) -> tuple[str, bool]:
    """The base's name, and whether it is a local folder, whose path means nothing elsewhere."""
    if model == EMBEDDED:
        return HUB_NAME, False
    local = Path(model).expanduser().exists()
    return (Path(model).expanduser().resolve().name if local else model), local


def _loading(recipe: Recipe, spec: HeadSpec) -> str:
    """The section on loading: by stock PEFT or transformers, or by our own loader."""
    if not recipe.writes and spec.pooling == "mean":
        return """## Loading

```python
from ziggurat.training import load_adapter_model

model = load_adapter_model("path/to/this/folder").model
```
"""
    kind = recipe.kind.model
    is_adapter = METHODS[recipe.method["name"]].config is not None
    package, prefix = ("peft", "AutoPeftModelFor") if is_adapter else ("transformers", "AutoModelFor")
    if spec.images:
        prefix, kind = ("AutoPeftModel", "") if is_adapter else (prefix, "ImageTextToText")
    # An adapter's base comes without the head's size; a whole model's config has it.
    labels = f", num_labels={len(spec.label_names) or 1}" if is_adapter and not recipe.writes else ""
    return f"""## Loading

```python
from {package} import {prefix}{kind}

model = {prefix}{kind}.from_pretrained("path/to/this/folder"{labels})
```
"""
