"""Serving LoR2C: a model folder with code that adds the paths, and the injected LoRA as plain LoRA.

No weight can absorb a path, so a model that runs without ziggurat must include the paths' code: transformers loads such
a folder with `trust_remote_code=True`. Without it loading fails, as it should: the model type is unique to the folder,
so that nobody gets the base model by mistake.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ziggurat.errors import ExportError
from ziggurat.files.staging import written_beside
from ziggurat.host.base.tied import note_untied
from ziggurat.host.base.unwrap import PREFIX, bare_path, bare_tree, unwrap
from ziggurat.host.paths.layer import CHILD
from ziggurat.methods.lor2c.layer import LoR2CLinear, LoR2CPath
from ziggurat.methods.lor2c.layout import holder_of
from ziggurat.methods.lor2c.paths import PathBank

MODULE = "modeling_lor2c"
CODE = (Path(__file__).parent / "remote_code.txt").read_text(encoding="utf-8")


def write_remote_code_model(model: nn.Module, tokenizer: Any, out: str | Path, adapter: str | None = None) -> Path:
    """Write `model` with the paths of one LoR2C adapter to the folder `out`, to be loaded without ziggurat.

    The paths' factors lie beside the model's weights, scale folded in; injected LoRA and modules_to_save are put into
    the weights. `AutoModelFor...from_pretrained(out, trust_remote_code=True)` then gives the same outputs. `model` is
    left as it is. `tokenizer` may be None. `adapter`: by default the only one.

    Raises:
        ExportError: no transformers model, several adapters to choose from, adapters of other methods in the model,
            or quantised weights.
    """
    base, _ = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        raise ExportError(f"{type(base).__name__} is no transformers model, so no from_pretrained could load it back.")
    bank, adapter = _bank(base, adapter)
    kind, config = type(base), base.config
    body = _body(kind, type(config))
    names = {
        "base": kind.__name__,
        "base_config": type(config).__name__,
        "model": f"LoR2C{kind.__name__}",
        "config": f"LoR2C{type(config).__name__}",
        "model_type": f"lor2c-{config.model_type}",
        "child": CHILD,
        "base_body": body.__name__,
        "body": f"LoR2C{body.__name__}",
        "prefix": kind.base_model_prefix,
        "imports": ", ".join(sorted({kind.__name__, body.__name__, type(config).__name__})),
    }
    if getattr(transformers, kind.__name__, None) is not kind or not hasattr(transformers, names["base_config"]):
        raise ExportError(f"{kind.__name__} isn't one of transformers' own classes, which the written code builds on.")
    weights, layout = _weights(base, bank, adapter)
    with written_beside(Path(out)) as folder:
        (folder / f"{MODULE}.py").write_text(_filled(names), encoding="utf-8")
        # Run as it is, outside transformers' cache of remote code.
        written = runpy.run_path(str(folder / f"{MODULE}.py"), run_name=MODULE)
        its_config = written[names["config"]](**{k: v for k, v in config.to_dict().items() if k != "model_type"})
        its_config.lor2c_paths = layout
        its_config.auto_map = {"AutoConfig": f"{MODULE}.{names['config']}"}
        if body is not kind:  # before the others: servers take the first
            its_config.auto_map["AutoModel"] = f"{MODULE}.{names['body']}"
        its_config.auto_map |= dict.fromkeys(_auto_classes(kind.__name__), f"{MODULE}.{names['model']}")
        with torch.device("meta"):
            whole = written[names["model"]](its_config)
        # Every name has its tensor, tied ones the same: tie_weights could only tie what was trained apart.
        whole.load_state_dict(weights, strict=False, assign=True)
        note_untied(whole)
        if lacking := sorted(name for name, tensor in whole.state_dict().items() if tensor.is_meta):
            raise ExportError(f"the model's weights lack {', '.join(lacking[:3])}: is it whole, and not offloaded?")
        if base.can_generate():
            whole.generation_config = base.generation_config
        # As the classes have them: their model type is new and has no conversion back from a checkpoint's older names.
        whole.save_pretrained(str(folder), save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    return Path(out)


def write_injected_lora(model: nn.Module, out: str | Path, adapter: str | None = None) -> Path:
    """Write the LoRA of the layers whose path it replaced as a plain PEFT LoRA folder. The paths are left out.

    The result is not the whole adapter, only the part that plain LoRA can express.

    Raises:
        ExportError: no layer has LoRA in place of a path.
    """
    base, _ = unwrap(model)
    bank, adapter = _bank(base, adapter)
    config = bank.adapters[adapter].config
    injected = dict(_injected(base, adapter))
    if not injected:
        raise ExportError(
            f"adapter {adapter!r} has LoRA in no layer, only paths, which no linear layer's weight can absorb. Keep "
            "the adapter, or write a model folder with its paths by `ziggurat merge`."
        )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_r,
        target_modules=sorted(injected),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    tensors = {}
    for path, linear in injected.items():
        a, b = linear.effective_pair(adapter)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous()
    with written_beside(Path(out)) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora.save_pretrained(str(folder))
    return Path(out)


def _bank(base: nn.Module, adapter: str | None) -> tuple[PathBank, str]:
    others = {
        type(m).__name__
        for m in base.modules()
        if isinstance(m, BaseTunerLayer) and not isinstance(m, LoR2CLinear | LoR2CPath | PathBank)
    }
    if others:
        raise ExportError(
            f"the model also has adapters of other methods ({', '.join(sorted(others))}). Merge those into the weights "
            "first, then add the LoR2C adapter to the merged model."
        )
    bank = next((m for m in base.modules() if isinstance(m, PathBank)), None)
    names = list(bank.adapters) if bank is not None else []
    if bank is None or (adapter is None and len(names) != 1) or (adapter is not None and adapter not in names):
        raise ExportError(f"adapter {adapter!r}: name one of the model's LoR2C adapters: {', '.join(names) or 'none'}.")
    return bank, adapter or names[0]


def _weights(base: nn.Module, bank: PathBank, adapter: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """All tensors of the model with the adapter in it; and for every path the data that the written code needs."""
    weights: dict[str, Tensor] = {}
    for node in bare_tree(base).walk():
        module, at = node.module, f"{node.path}." if node.path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                weights[at + name] = tensor.detach()
    for path, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            if not isinstance(module, ModulesToSaveWrapper):
                raise ExportError(f"{path}: {type(module).__name__} can't be written; train the module whole instead.")
            where = bare_path(base, path)
            weights |= {f"{where}.{k}": v for k, v in module.modules_to_save[adapter].state_dict().items()}
    for path, linear in _injected(base, adapter):
        if linear.quantization_backend is not None:
            raise ExportError(
                f"{path} is quantised: put the adapter into the model before quantisation, then write it."
            )
        name = f"{path}.weight"
        weights[name] = weights[name] + linear.get_delta_weight(adapter).to(weights[name].dtype)
    where = {id(module): path for path, module in base.named_modules()}
    layout: list[dict[str, Any]] = []
    for stack, state in bank.adapters[adapter].structure.items():
        members = bank.members[stack]
        for span in state.spans:
            layers = [where[id(members[n])].rpartition(".")[0] for n in span.layers]
            a, b = members[span.last].effective_pair(adapter)
            at = where[id(members[span.last])]
            weights |= {f"{at}.A": a.detach().clone(), f"{at}.B": b.detach().clone()}
            rank, width = a.shape
            layout.append({"holder": holder_of(base, stack), "layers": layers, "rank": rank, "width": width})
    return weights, layout


def _injected(base: nn.Module, adapter: str) -> Iterator[tuple[str, LoR2CLinear]]:
    for path, module in base.named_modules():
        if isinstance(module, LoR2CLinear) and adapter in module.adapters:
            bare = bare_path(base, path)
            assert bare is not None
            yield bare, module


def _auto_classes(architecture: str) -> list[str]:
    """The Auto classes of transformers that load `architecture`."""
    autos = {name: getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModel")}
    return sorted(
        name
        for name, auto in autos.items()
        if architecture in getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {}).values()
    )


def _body(kind: type[PreTrainedModel], config: type[Any]) -> type[PreTrainedModel]:
    """The class without a head that AutoModel gives for `config`; `kind` itself where there is none, or it is that."""
    mapping: Any = transformers.AutoModel._model_mapping
    body = mapping.get(config, kind)
    return body if isinstance(body, type) else kind


def _filled(names: dict[str, str]) -> str:
    code = CODE if names["body"] != names["model"] else CODE.partition("\n\n\nclass <body>")[0] + "\n"
    for name, value in names.items():
        code = code.replace(f"<{name}>", value)
    return code
