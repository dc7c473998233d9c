"""The subject of an evaluation: a folder of `ziggurat train`, an adapter saved by PEFT, or a model without adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ziggurat.errors import ConfigError, RecipeError, ZigguratError, with_article
from ziggurat.recipe.run_files import is_run

if TYPE_CHECKING:
    from ziggurat.recipe.schema import Recipe
    from ziggurat.training.answers.load import Loaded
    from ziggurat.training.model.base import HeadSpec

#: A model's name on the hub.
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
#: Endings of the class names of models that write text, in a config's `architectures`.
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TASKS_WITHOUT_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Subject:
    """The model or adapter at a path, identified without loading weights.

    `model`: folder or hub name. `recipe` and `head`: of a run. `gguf_file`: of a model in llama.cpp's format.
    """

    kind: Literal["run", "adapter", "base"]
    model: str
    gguf_file: str | None = None
    recipe: Recipe | None = None
    head: HeadSpec | None = None


def find_subject(place: str | Path) -> Subject:
    """The subject at `place`: a folder, a `.gguf` file, or the hub's name of a model if no such folder exists.

    Raises:
        ConfigError: nothing is there, or an invalid adapter (see `host.saved.folder.adapter_config`).
        RecipeError: a run that isn't finished or was changed.
    """
    from ziggurat.host.saved.folder import adapter_config

    path = Path(place).expanduser()
    if is_run(path):
        from ziggurat.training.answers.load import head_of, read_run

        recipe, run = read_run(path)
        return Subject("run", str(path), recipe=recipe, head=head_of(run, path))
    if path.suffix == ".gguf" and path.is_file():
        return Subject("base", str(path.parent), path.name)
    if not (path / "adapter_config.json").is_file():
        if path.is_dir() and ((path / "config.json").is_file() or any(path.glob("*.gguf"))):
            return Subject("base", str(path))
        if (
            not path.exists()
            and _HUB_NAME.fullmatch(str(place))
            and ("/" not in str(place) or not path.parent.is_dir())
        ):
            return Subject("base", str(place))
    adapter_config(path)
    return Subject("adapter", str(path))


def check_tasks(subject: Subject, tasks: list[str]) -> None:
    """Check that a subject can be scored on tasks: `glue/<task>` by a run's head, lm-eval's by a model that writes.

    Raises:
        RecipeError, DataError: it can't.
    """
    glue = [name for name in tasks if name.startswith("glue/")]
    if glue and subject.kind == "base":
        raise RecipeError(f"{glue[0]} is answered by a trained head; '{subject.model}' is a model without adapter")
    if glue:
        from ziggurat.training.answers.load import head_of, read_run

        from .glue import task_for

        recipe, run = read_run(Path(subject.model))
        for name in glue:
            task_for(recipe, head_of(run, Path(subject.model)), name.removeprefix("glue/"))
    lm_tasks = [name for name in tasks if name not in glue]
    kind = _without_text(subject) if lm_tasks else None
    if kind is not None:
        raise RecipeError(f"{', '.join(lm_tasks)}: tasks of lm-eval need a language model; '{subject.model}' {kind}")


def _without_text(subject: Subject) -> str | None:
    """The reason why a subject writes no text; None if it does, or if its files don't tell."""
    if subject.recipe is not None:
        trained = f"was trained for {subject.recipe.task}: score it on glue/<task>, or use `ziggurat predict`"
        return None if subject.recipe.writes else trained
    if subject.kind == "adapter":
        from ziggurat.host.saved.folder import adapter_config

        task = adapter_config(subject.model).task_type
        name = str(getattr(task, "value", task))
        return f"is an adapter for {name}" if name in _TASKS_WITHOUT_TEXT else None
    if subject.gguf_file is not None or any(Path(subject.model).glob("*.gguf")):
        return None  # llama.cpp's format holds models that write
    from ziggurat.training.model.meta import bare_config

    try:
        names = list(bare_config(subject.model).architectures or ())
    except ZigguratError:
        return None  # loading raises an error that says more
    return f"is {with_article(names[0])}" if names and not any(name.endswith(_WRITERS) for name in names) else None


def load_subject(subject: Subject, dtype: str = "auto") -> tuple[Any, Any, Loaded | None]:
    """A model in evaluation mode on the accelerator if there is one, its tokenizer, and for a run its `Loaded`.

    `dtype`: of the weights of a model without adapter; a run's recipe, or an adapter's base, names its own.

    Raises:
        RecipeError, ConfigError: something is missing, damaged, or doesn't fit.
    """
    from ziggurat.training.model.base import HeadSpec, device, load_base

    if subject.kind == "run":
        from ziggurat.training.answers.load import load_adapter_model

        loaded = load_adapter_model(subject.model)
        return loaded.model, loaded.tokenizer, loaded
    if subject.kind == "base":
        from ziggurat.host.bars import quiet

        with quiet():
            base = load_base(subject.model, HeadSpec("instruct", []), gguf_file=subject.gguf_file, dtype=dtype)
        model: Any = base.model
        return _placed(model, device()), base.tokenizer, None
    from transformers import AutoTokenizer

    from ziggurat.host.bars import without_bars
    from ziggurat.host.saved import folder

    home = Path(subject.model)
    with without_bars():
        model = folder.load_adapter(home, folder.load_base(home))
    has_tokenizer = (home / "tokenizer_config.json").is_file()
    name = str(home) if has_tokenizer else folder.adapter_config(home).base_model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of '{name}' can't be read: {error}") from error
    return _placed(model, device()), tokenizer, None


def _placed(model: Any, device: Any) -> Any:
    """On `device`, unless quantisation or a device map has placed it."""
    if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
    return model.eval()
