"""TRL's trainers that learn from rewards of the model's own completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationConfig

from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.tasks import REWARDED

from ..data.prompts import fitting_prompts, opened
from ..data.template import stop_at_turns
from ..folder.checkpoints import OrderOfEpoch, Resumable, step_of
from ..folder.workplace import LOGS
from .arguments import Setup, Task
from .writing import check_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

#: The file, in a run's logs, of completions with their rewards.
COMPLETIONS = "completions.jsonl"
#: The most completions of a step, and of a scoring, that are kept there.
KEPT = 8
#: Stands for a trainer of TRL's, which importing this file must not load.
_TRL: Any = object


def rewarding(setup: Setup) -> Task:
    """GRPO (Shao et al. 2024) or RLOO (Ahmadian et al. 2024) by TRL, and notes. Raises DataError, RecipeError.

    Each step draws a group of completions for each of its prompts, and raises the probability of those with a reward
    above their group's. Dropout is off: completions must come from the trained model itself.
    """
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    recipe, rewards = setup.recipe, setup.rewards
    kind, config = (GRPOTrainer, GRPOConfig) if recipe.task == "grpo" else (RLOOTrainer, RLOOConfig)
    rewarded = {"beta": recipe.rewards.beta, "reward_weights": recipe.rewards.weights, "logging_steps": 1}
    made: Any = config(**(setup.arguments | sampling_arguments(recipe) | rewarded))
    prompts = made.generation_batch_size // recipe.sampling.completions
    rows, notes = prompt_rows(setup, prompts)
    if recipe.rewards.beta:
        _check_start(recipe, setup.base.tokenizer, setup.model)
    inputs = {"reward_funcs": list(rewards.values()), "processing_class": setup.base.tokenizer}
    trainer = setup.trainer(type(kind.__name__, (Rewarded, kind), {}), made, rows, **inputs)
    trainer.samples = setup.checkpoints.with_name(LOGS) / COMPLETIONS
    notes.append(
        f"{prompts} prompts of {recipe.sampling.completions} completions a step; rewarded by {', '.join(rewards)}; "
        f"completions are kept in {LOGS}/{COMPLETIONS}"
    )
    return Task(trainer, notes)


def sampling_arguments(recipe: Recipe) -> dict[str, Any]:
    """`sampling.*` as fields of TRL's configs."""
    sampling = recipe.sampling
    drawn: dict[str, Any] = {
        "max_completion_length": sampling.tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "disable_dropout": True,
    }
    if recipe.task in REWARDED:
        drawn |= {"num_generations": sampling.completions, "num_generations_eval": 1}
    if sampling.vllm is not None:
        drawn |= {f"vllm_{name}": value for name, value in (sampling.vllm_options or {}).items()}
        drawn |= {"use_vllm": True, "vllm_mode": sampling.vllm}
    return drawn


def prompt_rows(setup: Setup, prompts: int) -> tuple[list[Dataset], list[str]]:
    """The training and validation rows that a model draws completions for, of which a step takes `prompts`; and notes.

    The prompts are in TRL's form. Raises DataError, RecipeError.
    """
    recipe, base, shape = setup.recipe, setup.base, setup.examples.shape
    check_tokenizer(setup)
    *tables, notes = fitting_prompts(recipe, base.tokenizer, base.model.config, setup.examples)
    if prompts > len(tables[0]):
        have = f"{recipe.data.train} has {len(tables[0])} to learn"
        raise DataError(f"train.batch: a step takes {prompts} prompts, and {have}")
    if shape == "messages":
        stop_at_turns(base.model, base.tokenizer)

    def asking(rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "prompt": [opened({"prompt": prompt}, shape) for prompt in rows["prompt"]]}

    # Prompts are converted on reading: a table would give every message the keys of all.
    return [table.with_transform(asking) for table in tables], notes


def _check_start(recipe: Recipe, tokenizer: Any, model: Any) -> None:
    """Check that the model without its fresh adapter is the reference of the KL term.

    Raises RecipeError for an adapter that starts elsewhere, as PiSSA's does, which changes the base weights.
    """
    inputs = tokenizer("Yes", return_tensors="pt").to(next(model.parameters()).device)
    with torch.no_grad():
        fresh = model.eval()(input_ids=inputs["input_ids"]).logits
        with model.disable_adapter():
            bare = model(input_ids=inputs["input_ids"]).logits
    if not torch.allclose(fresh, bare, rtol=1e-3, atol=1e-3 * float(bare.abs().max())):
        if recipe.adapter is not None:
            raise RecipeError(
                f"rewards.beta: holds the model near the one without an adapter, and '{recipe.adapter}' has moved it; "
                "leave the key out, or merge that adapter first (ziggurat merge)"
            )
        raise RecipeError(
            f"rewards.beta: {recipe.method['name']} starts from other base weights than the model's, so that without "
            "its adapter there is no reference to stay near; leave the key out, or take another method"
        )


def _cut_back(samples: Path, step: int) -> None:
    """Drop the completions that a run resumed at `step` draws again, and an unfinished line of a killed run."""
    lines = [line for line in samples.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
    places = [(json.loads(line)["step"], json.loads(line)["part"]) for line in lines]
    is_kept = [at < step or (at == step and part == "validation") for at, part in places]
    samples.write_text("".join(line for line, keep in zip(lines, is_kept, strict=True) if keep), encoding="utf-8")


class Drawing(Resumable, _TRL):
    """Mixed into a trainer of TRL that draws completions: scoring uses the likeliest one."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return OrderOfEpoch(super()._get_train_sampler(*args, **kwargs), self)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm:
            with mock.patch.object(self.vllm_generation, "temperature", 0.0):
                return super()._generate_single_turn(*args, **kwargs)
        drawn = ("do_sample", "temperature", "top_p", "top_k", "min_p")
        greedy = {k: v for k, v in self.generation_kwargs.items() if k not in drawn} | {"do_sample": False}
        config = GenerationConfig(**greedy, disable_compile=True)
        with mock.patch.multiple(self, generation_kwargs=greedy, generation_config=config):
            return super()._generate_single_turn(*args, **kwargs)


class Rewarded(Drawing):
    """Scored by the rewards of the likeliest completion of each validation prompt."""

    samples: Path
    _scored: list[tuple[Tensor, Tensor]]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.accelerator.is_main_process and (self.model.training or not self._scored):
            self._keep(prompts, completions, rewards)
        if not self.model.training:
            lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
            self._scored.append((rewards, self.accelerator.gather(lengths)))
        return rewards

    def _keep(self, prompts: Any, completions: Any, rewards: Tensor) -> None:
        when = {"step": self.state.global_step, "part": "training" if self.model.training else "validation"}
        self.samples.parent.mkdir(parents=True, exist_ok=True)
        with self.samples.open("a", encoding="utf-8") as file:
            for prompt, completion, row in list(zip(prompts, completions, rewards.tolist(), strict=False))[:KEPT]:
                scores = dict(zip(self.reward_func_names, row, strict=True))
                line = {**when, "prompt": prompt, "completion": completion, "rewards": scores}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None and self.accelerator.is_main_process and self.samples.is_file():
            _cut_back(self.samples, step_of(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        self._prepare_inputs(inputs)
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._scored = []
        output = super().evaluation_loop(*args, **kwargs)
        self._metrics["eval"].clear()  # means of batches, of which the last may be smaller
        rows = len(self.eval_dataset)
        scores = torch.cat([rewards for rewards, _ in self._scored])[:rows].cpu().double()
        lengths = torch.cat([lengths for _, lengths in self._scored])[:rows].cpu().double()
        weighted = (scores * self.reward_weights.to(scores)).nansum(1)
        weighted[scores.isnan().all(1)] = torch.nan
        scores_by_name = {"reward": weighted.nanmean(), "tokens": lengths.mean()}
        if len(self.reward_func_names) > 1:
            scores_by_name |= dict(zip(self.reward_func_names, scores.nanmean(0), strict=True))
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": float(value) for name, value in scores_by_name.items()})
        return output
