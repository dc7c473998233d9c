"""Loading an adapter folder of `ziggurat train` as a model that answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from ziggurat.errors import RecipeError
from ziggurat.host.bars import quiet
from ziggurat.recipe.methods import METHODS
from ziggurat.recipe.recipe import recipe_of
from ziggurat.recipe.run_files import RECIPE, RUN, read_files
from ziggurat.recipe.schema import Recipe

from ..data.encode import Collator
from ..data.template import stop_at_turns
from ..heads import MeanPooledClassifier
from ..model.base import HeadSpec, base_of, device, load_processor


@dataclass(frozen=True)
class Loaded:
    """A trained model (in evaluation mode, on the accelerator if there is one) with its tokenizer, recipe and head.

    `processor`: of a vision-language model, with the tokenizer in it.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    head: HeadSpec
    run: dict[str, Any]
    processor: ProcessorMixin | None = None

    @property
    def writer(self) -> Any:
        """The tokenizer, or the processor's `Writer`, which applies the chat template."""
        from ..model.seeing import writer_of

        return writer_of(self.tokenizer, self.processor)

    @torch.no_grad()
    def scores(self, columns: Mapping[str, Sequence[Any]], size: int) -> Iterator[Tensor]:
        """The logits of each row of encoded texts in order, (classes,) or (tokens, classes); `size` rows at a time."""
        collate, device = Collator(self.tokenizer), next(self.model.parameters()).device
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for start in range(0, len(rows), size):
            inputs = {name: value.to(device) for name, value in collate(rows[start : start + size]).items()}
            logits = self.model(**inputs).logits.float().cpu()
            of_tokens = logits.dim() == 3
            masks = inputs["attention_mask"].bool().cpu()
            yield from (row[mask] if of_tokens else row for row, mask in zip(logits, masks, strict=True))

    @property
    def whole_tokenizer(self) -> Any:
        """The processor or tokenizer to save beside a model."""
        return self.processor or self.tokenizer


def load_adapter_model(folder: str | Path) -> Loaded:
    """Rebuild base model, head and adapter from a folder of `ziggurat train`.

    The base is found by the recipe's `model`, not by a path of the training machine: an adapter on the embedded model
    works on any machine. Raises RecipeError if the folder isn't a run's, or its base can't be found.
    """
    path = Path(folder).expanduser()
    recipe, run = read_run(path)
    spec = head_of(run, path)
    with quiet():
        if (path / "adapter_config.json").is_file():
            base = base_of(recipe, spec, tokenizer_from=str(path))
            try:
                model: nn.Module = PeftModel.from_pretrained(base.model, str(path))
            except (ValueError, KeyError, RuntimeError, OSError) as error:
                raise RecipeError(f"the adapter in '{folder}' does not fit {recipe.model}: {error}") from error
            tokenizer, processor = base.tokenizer, base.processor
        else:
            # No pickle, and no code of the folder.
            safe = {"use_safetensors": True, "trust_remote_code": False}
            try:
                auto: Any = getattr(transformers, f"AutoModelFor{spec.model}")
                kind: Any = MeanPooledClassifier if spec.pooling == "mean" else auto
                model = kind.from_pretrained(str(path), dtype=recipe.dtype, **safe)
                processor = load_processor(str(path), str(path), {"trust_remote_code": False}) if spec.images else None
                tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise RecipeError(f"the model in '{folder}' cannot be read: {error}") from error
    if not getattr(model, "is_quantized", False) and not METHODS[recipe.method["name"]].four_bits:
        model = model.to(device())
    loaded = Loaded(model.eval(), tokenizer, recipe, spec, run, processor)
    if run.get("shape") == "messages":
        stop_at_turns(model, loaded.writer)
    return loaded


def read_run(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and run.json of an adapter folder. Raises RecipeError that names missing files."""
    run, text = read_files(path, "head")
    return recipe_of(text, label=str(path / RECIPE)), run


def head_of(run: dict[str, Any], path: Path) -> HeadSpec:
    """The head's specification in run.json. Raises RecipeError if it is invalid."""
    head = run["head"]
    names = head.get("label_names") if isinstance(head, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str | int | float) for name in names):
        raise RecipeError(f"'{path / RUN}' has been changed: its head names no labels")
    try:
        return HeadSpec(**head)
    except TypeError as error:
        raise RecipeError(f"'{path / RUN}' has been changed: {error}") from error
