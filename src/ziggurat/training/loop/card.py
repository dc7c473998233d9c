"""The complete model card of a run, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ziggurat._distribution import VERSION
from ziggurat.host.saved.card import BEGIN
from ziggurat.recipe.embedded import EMBEDDED, HUB_NAME
from ziggurat.recipe.methods import METHODS, shown
from ziggurat.recipe.schema import Recipe

from .metrics import lower_is_better

if TYPE_CHECKING:
    from ..model.base import HeadSpec
    from .result import Result

#: The text of a card, beside this file.
TEMPLATE = "card.md.jinja"

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
    section = text[text.index(BEGIN) :].rstrip() if BEGIN in text else ""
    # PEFT's config doesn't have the number of classes.
    placeholder, actual = ", num_labels=2)  # as many as it was trained with", f", num_labels={spec.num_labels})"
    section = section.replace(placeholder, actual)
    if spec.images:
        section = section.replace("AutoModel  # or the class for your task", "AutoModelForImageTextToText")
        section = section.replace("= AutoModel.", "= AutoModelForImageTextToText.")
    path.write_text(run_card(recipe, spec, result, versions, section), encoding="utf-8")


def run_card(recipe: Recipe, spec: HeadSpec, result: Result, versions: dict[str, str], section: str = "") -> str:
    """Front matter and text: data, rows, scores, settings, cost, versions; `section`, or else a section on loading."""
    base, local = _base(recipe.model)
    front: dict[str, Any] = {"library_name": "peft" if METHODS[result.method].config else "transformers"}
    if not local:
        front["base_model"] = base
        if front["library_name"] == "peft":
            front["base_model_relation"] = "adapter"
    front["pipeline_tag"] = _PIPELINES[spec.model]
    front["tags"] = ["ziggurat", result.method, recipe.task]
    where = f"`{base}`, a model in a folder of the machine that trained" if local else f"[{base}](https://hf.co/{base})"
    data = recipe.data.train if not Path(recipe.data.train).expanduser().exists() else Path(recipe.data.train).name
    markdown = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)  # noqa: S701
    return markdown.get_template(TEMPLATE).render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        recipe=recipe,
        result=result,
        method=shown(result.method),
        where=where,
        lower_is_better=lower_is_better,
        data=data,
        settings=", ".join(f"{key} {value}" for key, value in recipe.method.items() if key != "name"),
        version=VERSION,
        packages=", ".join(f"{package} {number}" for package, number in versions.items() if package != "machine"),
        section=section,
        **_loading(recipe, spec),
    )


def _base(model: str) -> tuple[str, bool]:
    """The base's name, and whether it is a local folder, whose path means nothing elsewhere."""
    if model == EMBEDDED:
        return HUB_NAME, False
    local = Path(model).expanduser().exists()
    return (Path(model).expanduser().resolve().name if local else model), local


def _loading(recipe: Recipe, spec: HeadSpec) -> dict[str, str]:
    """The class of stock PEFT or transformers that loads the result; an empty name if only our own loader does."""
    is_adapter = METHODS[recipe.method["name"]].config is not None
    # An adapter's base comes without the head's size; a whole model's config has it.
    labels = f", num_labels={len(spec.label_names) or 1}" if is_adapter and not recipe.writes else ""
    if not recipe.writes and spec.pooling == "mean":
        kind = ""
    elif is_adapter:
        kind = "AutoPeftModel" if spec.images else f"AutoPeftModelFor{spec.model}"
    else:
        kind = f"AutoModelFor{spec.model}"
    return {"package": "peft" if is_adapter else "transformers", "kind": kind, "labels": labels}
