"""On-policy distillation: a student learns a teacher's probabilities for its own completions."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ziggurat.errors import RecipeError, first_line
from ziggurat.nearest import is_path, missing_path
from ziggurat.recipe.embedded import model_path
from ziggurat.recipe.schema import Recipe

from .arguments import Setup, Task
from .preference import trl_classes
from .rewards import drawing_problems
from .sampling import Drawing, prompt_rows, sampling_arguments


def distilling(setup: Setup) -> Task:
    """On-policy distillation (Agarwal et al. 2024) by TRL, and notes. Raises DataError, RecipeError.

    Each step draws a completion of each of its prompts from the student, and lowers, token by token, the divergence of
    its probabilities p from the teacher's q: beta = 1: KL(p | q), 0: KL(q | p), between: beta KL(q | m) + (1 - beta)
    KL(p | m) with m = beta q + (1 - beta) p, both at `sampling.temperature`.
    """
    recipe, base = setup.recipe, setup.base
    kind, config = trl_classes(recipe.task, "trl", "DistillationTrainer", "DistillationConfig")
    if problems := drawing_problems(recipe, config):
        raise RecipeError("\n".join(problems))
    rows, notes = prompt_rows(setup, recipe.train.batch * recipe.train.accumulate)
    teacher = load_teacher(recipe, base.tokenizer, base.model.config)
    arguments = config(**setup.arguments, **sampling_arguments(recipe), beta=recipe.teacher.beta)
    inputs = {"teacher_model": teacher, "processing_class": base.tokenizer}
    trainer = setup.trainer(type(kind.__name__, (Distilled, kind), {}), arguments, rows, **inputs)
    size = sum(parameter.numel() for parameter in teacher.parameters())
    notes.append(
        f"the teacher {recipe.teacher.model} has {size:,} parameters, which take memory in addition to the student's"
    )
    return Task(trainer, notes)


def load_teacher(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any) -> Any:
    """The teacher, frozen. Raises RecipeError if it can't be loaded, or has other tokens than the student."""
    name = str(recipe.teacher.model)
    path = model_path(name)
    where: dict[str, Any] = {"revision": recipe.teacher.revision or "main", "trust_remote_code": False}
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(path, **where)
        teacher = AutoModelForCausalLM.from_pretrained(path, dtype=recipe.teacher.dtype, **where)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        why = missing_path(name) if is_path(name) else f"'{name}' cannot be loaded: {first_line(error)}"
        raise RecipeError(f"teacher.model: {why}; an adapter is merged first, by `ziggurat merge`") from error
    sizes = [each.get_text_config().vocab_size for each in (config, teacher.config)]
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab() or len(set(sizes)) > 1:
        raise RecipeError(
            f"teacher.model: the tokens of {name} ({sizes[1]:,}) are not those of {recipe.model} ({sizes[0]:,}), and "
            "their probabilities are compared one by one; take a teacher of the same family"
        )
    return teacher.requires_grad_(False)


class Distilled(Drawing):
    """Mixed into TRL's trainer: scored by the divergence of the likeliest completion of each validation prompt."""

    _sums: Tensor

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).float()
        tokens = inputs["completion_mask"].sum().to(loss)
        rows = torch.full_like(tokens, len(inputs["completion_mask"]))
        self._sums += self.accelerator.gather(torch.stack([loss * tokens, tokens, rows])[None]).sum(0).cpu().double()
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sums = torch.zeros(3, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        self._metrics["eval"].clear()  # means of batches, of which the last may be smaller
        total, tokens, rows = self._sums.tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = {f"{prefix}_divergence": total / max(tokens, 1), f"{prefix}_tokens": tokens / max(rows, 1)}
        output.metrics.update(means)
        return output
