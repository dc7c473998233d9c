"""What will not work, and why, before it fails: of this machine, of a recipe, of an adapter's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziggurat.errors import ConfigError, ZigguratError

from .facts import METHODS, fact

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """`level`: "error" (will fail), "warning" (works with a limit, or was never tried) or "note"."""

    level: str
    what: str
    why: str
    do: str = ""


def environment() -> Iterator[Finding]:
    """Installed versions against the ones that were tested."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    for text in requires("ziggurat") or []:
        wanted = Requirement(text)
        # An extra's requirements are optional, and checked where something asks for the extra.
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(wanted.name)
        except PackageNotFoundError:
            yield Finding(
                "error", f"{wanted.name} is not installed", f"ziggurat needs {wanted}", f"pip install '{wanted}'"
            )
            continue
        if not wanted.specifier.contains(have, prereleases=True):
            yield Finding(
                "error",
                f"{wanted.name} {have}",
                f"ziggurat was tested with {wanted}; its seams to PEFT and transformers move between versions",
                f"pip install '{wanted}'",
            )


def distributed(method: str, variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """The way of `accelerate launch` or `torchrun`, told from the environment variables that these set."""
    env = os.environ if variables is None else variables
    if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        yield from _cell("deepspeed", method)
    elif env.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        yield from _cell("fsdp2" if env.get("FSDP_VERSION") == "2" else "fsdp1", method)
    elif int(env.get("WORLD_SIZE", "1") or 1) > 1:
        yield from _cell("ddp", method)


def base_model(name: str, method: str) -> Iterator[Finding]:
    """The base model's quantisation, told from its config."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        yield Finding(
            "warning", f"base model {name}", f"its config was not found: {first}", "name a folder or cached model"
        )
        return
    quantised = getattr(config, "quantization_config", None) or {}
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if kind:
        kind = str(getattr(kind, "value", kind))
        known = next((k for k in ("bitsandbytes", "hqq", "torchao") if kind.startswith(k)), "packed")
        yield from _cell(known, method, f"base quantised by {kind}")


def recipe(value: Any, variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """A checked recipe on this machine."""
    from importlib.util import find_spec

    import torch

    from ziggurat.training.bare import bare_model
    from ziggurat.training.closed_form import count
    from ziggurat.training.embedded import model_path
    from ziggurat.training.methods import method_config

    method = value.method["name"]
    if value.task == "instruct" and find_spec("trl") is None:
        yield Finding("error", "task: instruct", "TRL is not installed", "pip install 'ziggurat[instruct]'")
    if value.train.precision == "fp16" and not torch.accelerator.is_available():
        yield Finding("error", "train.precision: fp16", "this machine has no accelerator", "use fp32 or bf16")
    yield from base_model(model_path(value.model), method)
    yield from distributed(method, variables)
    if method in METHODS:
        try:
            bare = bare_model(value.model, value.task)
        except ConfigError:
            return  # said already
        try:
            count(bare, method_config(value.method))
        except ZigguratError as error:
            yield Finding("error", f"method {method} in {value.model}", str(error))


def adapter(folder: str | Path, variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """An adapter's folder: its numbers, its base model, and who can serve it.

    Raises:
        ConfigError: the folder holds no readable adapter.
    """
    from ziggurat.analysis import collect
    from ziggurat.export import SERVING_RANKS
    from ziggurat.host.folder import adapter_config, tensor_shapes

    config = adapter_config(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    method = kind.lower()
    try:
        collected = collect(folder)
    except ConfigError as error:
        if "is an adapter of PEFT method" not in str(error):
            raise
        collected = None
        yield Finding("note", f"method {kind}", "its numbers were not looked at; analysis doesn't read this method")
    for note in collected.notes if collected is not None else ():
        broken = "NaN" in note
        untrained = "never trained" in note
        yield Finding("error" if broken else "warning" if untrained else "note", "the adapter's numbers", note)
    base = str(config.base_model_name_or_path or "")
    if not base:
        yield Finding("warning", "base model", "the config doesn't say which", "give it when loading, and save again")
    else:
        if os.path.isabs(base):
            yield Finding(
                "warning",
                f"base model {base}",
                "a path of one machine: elsewhere the adapter doesn't find its model",
                "set base_model_name_or_path in adapter_config.json to a hub name",
            )
        yield from base_model(base, method)
    if method in METHODS:
        for key in ("vllm", "llama_cpp"):
            if fact(key).cells[method] == "no":
                yield from _cell(key, method)
    extra = [n for n in tensor_shapes(folder) if not _is_factor(n)]
    if extra:
        yield Finding(
            "warning",
            f"{len(extra)} tensors that are no factor pairs ({extra[0]}, ...)",
            "vLLM and llama.cpp reject modules_to_save and trained biases",
            "merge into the model to serve it",
        )
    if collected is not None and kind in ("LORA", "MSPLORA", "LORA2"):
        ranks = {c.rank for c in collected.components if c.part in ("update", "lora", "dora")}
        most = max(ranks, default=0)
        if most > SERVING_RANKS[-1]:
            yield Finding("error", f"rank {most}", f"vLLM allows at most {SERVING_RANKS[-1]}", "merge into the model")
        elif kind == "LORA" and (len(ranks) > 1 or most not in SERVING_RANKS):
            yield Finding(
                "note",
                f"ranks {sorted(ranks)}",
                f"vLLM's --max-lora-rank takes {', '.join(map(str, SERVING_RANKS))}",
                "pass the next larger one",
            )
        elif kind != "LORA":
            fitting = next(r for r in SERVING_RANKS if r >= most)
            yield Finding(
                "note",
                f"served as rank {fitting}",
                f"each linear's update has rank {most}, filled up to one that vLLM allows",
                "ziggurat export --serving",
            )
    if kind == "LORA":
        if getattr(config, "use_dora", False):
            yield Finding(
                "warning", "DoRA", "vLLM and llama.cpp don't apply magnitudes", "merge into the model to serve it"
            )
        odd = [n for n in ("rank_pattern", "alpha_pattern") if getattr(config, n, None)]
        odd += ["use_rslora"] if getattr(config, "use_rslora", False) else []
        if odd:
            yield Finding(
                "warning",
                " and ".join(odd),
                "PEFT scales each module by its own alpha and rank, vLLM all by one, and llama.cpp ignores rsLoRA",
                "fold the scale into B before serving",
            )
    yield from distributed(method, variables)


def _is_factor(name: str) -> bool:
    return any(word in name for word in ("lora_", "lora2_", "lor2c_", "msplora_", "dylora_"))


def _cell(key: str, method: str, what: str = "") -> Iterator[Finding]:
    row = fact(key)
    status = row.cells.get(method)
    if status in (None, "yes"):
        return
    levels = {"no": "error", "limited": "note", "untested": "warning"}
    said = {"no": "doesn't work", "limited": "works with limits", "untested": "untested"}
    yield Finding(levels[status], f"{METHODS[method]} with {what or row.what}: {said[status]}", row.why, row.instead)
