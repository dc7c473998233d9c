"""AdaLoRA's allocation of ranks, which PEFT expects the training loop to call."""

import json
import logging
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ziggurat.errors import RecipeError

logger = logging.getLogger(__name__)

#: Shares of the run before the first and after the last allocation if the recipe gives no steps; LoRA²'s defaults.
FIRST, LAST = 0.15, 0.5
TENSORS, PATTERN = "adalora_importance.safetensors", "adalora_ranks.json"


class AdaLoRAAllocation(TrainerCallback):
    """Calls `update_and_allocate` after each optimiser step, and keeps its averages in the checkpoints.

    `tinit` and `tfinal` of 0, PEFT's defaults, stand for 15% and 50% of the run. The config gets the kept directions
    only when training ends: with them PEFT saves no other ones, and a run can't resume from such a checkpoint.
    """

    def __init__(self, config: AdaLoraConfig) -> None:
        self.config = config
        self.rank_pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises RecipeError if the warm-ups leave no step for the allocation."""
        config, total = self.config, state.max_steps
        config.total_step = total
        config.tinit = config.tinit or round(FIRST * total)
        config.tfinal = config.tfinal or round(LAST * total)
        if config.tinit >= total - config.tfinal:
            raise RecipeError(
                f"method.tinit: {config.tinit} steps, and {config.tfinal} of method.tfinal, leave none of the run's "
                f"{total} to allocate ranks in; lower them, or leave them out"
            )
        if state.global_step:
            self._restore(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.config.rank_pattern = self.rank_pattern
        model.base_model.update_and_allocate(state.global_step)
        self.rank_pattern, self.config.rank_pattern = self.config.rank_pattern, None

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write the kept directions into the config, by E: they may be those of an earlier, better checkpoint."""
        if self.rank_pattern is not None:
            E = dict(model.base_model.model.named_parameters())
            self.config.rank_pattern = {name: E[name].detach().ne(0).flatten().tolist() for name in self.rank_pattern}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not (state.is_world_process_zero and folder.is_dir()):
            return
        allocator = model.base_model.rankallocator
        averages = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc}
        tensors = {f"{kind}:{name}": tensor for kind, part in averages.items() for name, tensor in part.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        (folder / PATTERN).write_text(json.dumps(self.rank_pattern), encoding="utf-8")

    def _restore(self, folder: Path, model: Any) -> None:
        if not (folder / TENSORS).is_file():
            logger.warning("%s lacks AdaLoRA's averages: the importance of directions starts anew", folder)
            return
        allocator, device = model.base_model.rankallocator, next(model.parameters()).device
        for key, tensor in load_file(folder / TENSORS).items():
            kind, _, name = key.partition(":")
            allocator.ipt[name] = tensor.new_zeros(tensor.shape, device=device)
            (allocator.exp_avg_ipt if kind == "ipt" else allocator.exp_avg_unc)[name] = tensor.to(device)
        self.rank_pattern = json.loads((folder / PATTERN).read_text(encoding="utf-8"))


def callbacks_for(peft_config: Any) -> list[TrainerCallback]:
    """The callbacks that `train` adds for a PEFT config; ziggurat's methods add theirs to every Trainer."""
    return [AdaLoRAAllocation(peft_config)] if isinstance(peft_config, AdaLoraConfig) else []
