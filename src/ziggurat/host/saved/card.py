"""The part of a saved adapter's model card that PEFT can't write: how to load it, and its citation."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from ziggurat._distribution import DISTRIBUTION
from ziggurat.host.base.unwrap import unwrap
from ziggurat.host.saved.folder import AUTO_CLASSES

BEGIN, END = "<!-- ziggurat: begin -->", "<!-- ziggurat: end -->"


def write_card(folder: Path, config: PeftConfig, library: str, citation: str) -> None:
    """Put the section at the end of `folder`/README.md, replacing an older one.

    `library`: the module of the base model's class, if PEFT noted it.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if rest else ""
    section = _section(config, _loading(config, library), citation)
    path.write_text(f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip(), encoding="utf-8")


def keep_section() -> None:
    """Make each loaded Trainer class put the section back after it has written its own model card."""
    from transformers import Trainer

    kinds: list[type] = [Trainer]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        writes = kind.__dict__.get("create_model_card")
        if writes is not None and not hasattr(writes, "ziggurat"):
            kind.create_model_card = _with_section(writes)


def _with_section(writes: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(writes)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = writes(self, *args, **kwargs)
        folder, model = Path(self.args.output_dir), self.accelerator.unwrap_model(self.model)
        config: Any = (getattr(model, "peft_config", None) or {}).get("default")
        if hasattr(config, "citation") and self.is_world_process_zero() and (folder / "README.md").is_file():
            write_card(folder, config, type(unwrap(model)[0]).__module__, config.citation)
        return result

    create_model_card.ziggurat = True  # type: ignore[attr-defined]
    return create_model_card


def _loading(config: PeftConfig, library: str) -> str:
    """Python that loads the adapter; its base is of the class that was noted, or that goes with the task."""
    if library.partition(".")[0] == "ziggurat":  # a head that only its own loader builds
        return """from ziggurat.training import load_adapter_model

model = load_adapter_model("path/to/this/folder").model"""
    base, task = config.base_model_name_or_path or "<the base model>", config.task_type
    has_class = task in AUTO_CLASSES
    model = AUTO_CLASSES[TaskType(task)] if has_class else "AutoModel"
    kind = "" if has_class else "  # or the class for your task"
    labels = ", num_labels=2)  # as many as it was trained with" if task in ("SEQ_CLS", "TOKEN_CLS") else ")"
    return f"""import {_package(config)}  # registers the method with PEFT
from peft import PeftModel
from transformers import {model}{kind}

base = {model}.from_pretrained("{base}"{labels}
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""


def _package(config: PeftConfig) -> str:
    """The module to import for the method: ziggurat, or that of an external method."""
    module = type(config).__module__
    return "ziggurat" if module.partition(".")[0] == "ziggurat" else module


def _section(config: PeftConfig, loading: str, citation: str) -> str:
    package = _package(config)
    where = f", which `pip install {DISTRIBUTION}` brings" if package == "ziggurat" else " and stands on `ziggurat`"
    cite = f"\n## Citation\n\n```bibtex\n{citation}\n```\n" if citation else ""
    return f"""{BEGIN}
## Loading this adapter

The adapter's method ({type(config).__name__}) comes from `{package}`{where}.
Import it before loading:

```python
{loading}
```

Without `ziggurat`: `ziggurat export ADAPTER OUT` writes it as a plain LoRA adapter where the method allows it.
{cite}{END}"""
