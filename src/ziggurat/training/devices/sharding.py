"""Sharding a model over several processes: FSDP2's units, and gathering the trained parameters at the end."""

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from ziggurat.errors import ProcessError, RecipeError, with_article
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.method import does_at_steps

from .processes import Processes


def check(model: nn.Module, processes: Processes) -> None:
    """Refuse methods that DeepSpeed makes impossible.

    DeepSpeed updates its shards and frees the gradients in the same call. So no method can rank directions by gradients
    after the step (LoRA², AdaLoRA), nor move weights from one path to another (LoR2C's events).

    Raises:
        RecipeError: the model has an adapter that needs one of these.
    """
    if processes.way != "deepspeed" or not isinstance(model, PeftModel):
        return
    config = model.peft_config["default"]
    needs = "ranks directions by their gradients" if isinstance(config, AdaLoraConfig) else does_at_steps(config)
    if needs:
        raise RecipeError(
            f"method: {type(config).__name__.removesuffix('Config')} {needs}, which DeepSpeed keeps to itself; launch "
            "with ddp or fsdp2 (`ziggurat launch-config`)"
        )


def prepare(trainer: Trainer, processes: Processes) -> None:
    """Prepare `trainer` for several processes, before it trains; in one process nothing is to be done.

    FSDP2 gets the classes of the model's layers as its units. accelerate would take `_no_split_modules`, in which some
    models name a module around the embedding, which accelerate then shards again, and others name no module.
    """
    if processes.way == "one":
        return
    trainer.add_callback(CheckWrapped(trainer, processes))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        anatomy = Anatomy(trainer.model)  # type: ignore[arg-type]
        layers = (path for stack in anatomy.stacks for path in anatomy.layers(stack))
        base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
        plugin.transformer_cls_names_to_wrap = sorted({type(base.get_submodule(path)).__name__ for path in layers})  # type: ignore[union-attr]


class CheckWrapped(TrainerCallback):
    """Stops a run whose processes would train independently.

    A library that considers a model prepared doesn't average its gradients, and doesn't warn.
    """

    def __init__(self, trainer: Trainer, processes: Processes) -> None:
        self.trainer = trainer
        self.processes = processes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ProcessError."""
        model = self.trainer.model_wrapped
        if self.processes.way == "ddp" and not isinstance(model, DistributedDataParallel):
            raise ProcessError(
                f"the {self.processes.size} processes would train independently: the model is "
                f"{with_article(type(model).__name__)} instead of one that shares gradients. Report this with the "
                "versions that `ziggurat doctor` shows"
            )


def whole_state(trainer: Trainer, processes: Processes) -> dict[str, Any] | None:
    """Gather the trained parameters on all processes; of a wholly trained model return the state dict, on rank 0.

    No forward may follow: the strategy's records of the shards are out of date.
    """
    if not processes.sharded:
        return None
    trainer.model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(trainer.model, PeftModel):
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    make_whole(trainer.model)
    return None


def make_whole(model: nn.Module) -> None:
    """Gather each trained parameter of `model` that FSDP2 or ZeRO-3 has sharded.

    All processes call it. A parameter that many layers share is owned, and so gathered, once.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    whole = {key: _whole(parameter) for key, parameter in trained.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            tensor = whole.get(id(parameter))
            if tensor is not None and tensor is not parameter:
                module._parameters[name] = nn.Parameter(tensor)


def _whole(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach()  # type: ignore[operator]
    if hasattr(parameter, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
            return parameter.detach().clone()
    return parameter
