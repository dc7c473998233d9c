"""The part of a saved adapter's model card that PEFT can't write: how to load it, and whom to cite."""

from pathlib import Path

from peft import TaskType

from ziggurat.host.folder import AUTO_CLASSES

BEGIN, END = "<!-- ziggurat: begin -->", "<!-- ziggurat: end -->"


def write_card(folder: Path, config_name: str, task: str | None, base_model: str, citation: str) -> None:
    """Put the section into `folder`/README.md, in the place of an older one, after whatever else stands there.

    `task` is PEFT's task_type, if there is one; it says which class of transformers the base model is.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if rest else ""
    section = _section(config_name, task, base_model, citation)
    path.write_text(f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip(), encoding="utf-8")


def _section(config_name: str, task: str | None, base_model: str, citation: str) -> str:
    base = base_model or "<the base model>"
    known = task in AUTO_CLASSES
    model = AUTO_CLASSES[TaskType(task)] if known else "AutoModel"
    kind = "" if known else "  # or the class for your task"
    labels = ", num_labels=2)  # as many as it was trained with" if task in ("SEQ_CLS", "TOKEN_CLS") else ")"
    return f"""{BEGIN}
## Loading this adapter

The adapter's method ({config_name}) comes from the package `ziggurat`. Import it before loading:

```python
import ziggurat  # registers the method with PEFT
from peft import PeftModel
from transformers import {model}{kind}

base = {model}.from_pretrained("{base}"{labels}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Without `ziggurat`: `ziggurat export ADAPTER OUT` writes it as a plain LoRA adapter where the method allows it.

## Citation

```bibtex
{citation}
```
{END}"""
