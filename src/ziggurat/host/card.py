"""The part of a saved adapter's model card that PEFT can't write: how to load it, and whom to cite."""

from pathlib import Path

BEGIN, END = "<!-- ziggurat: begin -->", "<!-- ziggurat: end -->"


def write_card(folder: Path, config_name: str, base_model: str, citation: str) -> None:
    """Put the section into `folder`/README.md, in the place of an older one, after whatever else stands there."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if rest else ""
    section = _section(config_name, base_model, folder.name, citation)
    path.write_text(f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip(), encoding="utf-8")


def _section(config_name: str, base_model: str, name: str, citation: str) -> str:
    base = base_model or "<the base model>"
    return f"""{BEGIN}
## Loading this adapter

The adapter's method ({config_name}) comes from the package `ziggurat`. Import it before loading:

```python
import ziggurat  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModel  # or the class for your task

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "{name}")
```

Without `ziggurat`: `ziggurat export ADAPTER OUT` writes it as a plain LoRA adapter where the method allows it.

## Citation

```bibtex
{citation}
```
{END}"""
