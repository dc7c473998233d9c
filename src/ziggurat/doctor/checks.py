"""Findings about a machine, a recipe or an adapter's folder: problems with their reasons, before anything fails."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ziggurat.errors import ConfigError, MissingExtraError, ZigguratError
from ziggurat.extras import install_command, missing
from ziggurat.host.method import does_at_steps, kind_of

from .finding import LEVELS, Finding, cell
from .machine import environment, machine
from .serving import serving

__all__ = ["LEVELS", "Finding", "adapter", "base_model", "distributed", "environment", "machine", "recipe"]


def distributed(method: str, variables: Mapping[str, str] | None = None, config: Any = None) -> Iterator[Finding]:
    """Findings about the launcher, `accelerate launch` or `torchrun`, by its environment variables.

    `config`: the method's, for findings that depend on its fields.
    """
    env = os.environ if variables is None else variables
    if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        needs = "ranks directions by their gradients" if method == "adalora" else does_at_steps(config)
        if needs:
            yield Finding(
                "error",
                f"method {method} with DeepSpeed",
                f"it {needs}, which DeepSpeed keeps to itself",
                "launch with ddp or fsdp2 (`ziggurat launch-config`)",
            )
        else:
            yield from cell("deepspeed", method)
    elif env.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        yield from cell("fsdp2" if env.get("FSDP_VERSION") == "2" else "fsdp1", method)
    elif int(env.get("WORLD_SIZE", "1") or 1) > 1:
        yield from cell("ddp", method)


def base_model(
    name: str, method: str, *, revision: str | None = None, gguf_file: str | None = None
) -> Iterator[Finding]:
    """The base model's quantisation, by its config."""
    from ziggurat.training.model.meta import bare_config

    try:
        config = bare_config(name, revision=revision, gguf_file=gguf_file)
    except MissingExtraError as error:
        yield Finding("warning", f"base model {name}", str(error))
        return
    except ConfigError as error:
        yield Finding(
            "warning", f"base model {name}", f"its config was not found: {error}", "name a folder or cached model"
        )
        return
    quantised = getattr(config, "quantization_config", None) or {}
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if kind:
        kind = str(getattr(kind, "value", kind))
        row = next((k for k in ("bitsandbytes", "hqq", "torchao") if kind.startswith(k)), "packed")
        yield from cell(row, method, f"base quantised by {kind}")


def recipe(value: Any, variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """A checked recipe on this machine."""
    import torch

    from ziggurat.recipe.embedded import PACKAGE, model_path
    from ziggurat.recipe.methods import METHODS as ALL
    from ziggurat.recipe.needs import needs
    from ziggurat.training.callbacks import trackers
    from ziggurat.training.model.base import find_gguf

    method = value.method["name"]
    asking = needs(value)
    lacking = missing(asking)
    for package in lacking:
        yield Finding("error", asking[package], f"{package} is not installed", install_command(lacking))
    if value.train.precision == "fp16" and not torch.accelerator.is_available():
        yield Finding("error", "train.precision: fp16", "this machine has no accelerator", "use fp32 or bf16")
    for name, package in trackers.lacking(value.train.report_to or []).items():
        yield Finding("error", f"train.report_to: {name}", "it is not installed", f"pip install {package}")
    if PACKAGE in lacking:  # without the model nothing more can be checked
        yield from distributed(method, variables)
        return
    try:
        gguf = find_gguf(model_path(value.model), value.gguf_file)
    except ZigguratError as error:
        yield Finding("error", "gguf_file", str(error))
        return
    if gguf is not None and missing(["gguf"]):
        if "gguf" not in lacking:  # the recipe doesn't name the file: it is the only one in the model's folder
            yield Finding("error", f"gguf_file: {gguf}", "gguf is not installed", install_command(["gguf"]))
        return
    findings = list(base_model(model_path(value.model), method, revision=value.revision, gguf_file=gguf))
    yield from findings
    if any("config was not found" in finding.why for finding in findings) or ALL[method].config is None:
        yield from distributed(method, variables)
    else:
        yield from _fit(value, variables)


def _fit(value: Any, variables: Mapping[str, str] | None) -> Iterator[Finding]:
    """Whether a recipe's method fits its model, its budget met as `ziggurat train` meets it."""
    from ziggurat.recipe.methods import METHODS as ALL
    from ziggurat.recipe.methods import method_config
    from ziggurat.training.model.adapt import check_targets
    from ziggurat.training.sizing.budget import recipe_model, settle_budget
    from ziggurat.training.sizing.counts import count

    method, config = value.method["name"], None
    try:
        bare = recipe_model(value)
        config = method_config(settle_budget(value)[0].method)
        check_targets(config, bare)
        if ALL[method].ranks is not None:
            count(bare, config)
    except (ZigguratError, ValueError, TypeError) as error:
        yield Finding("error", f"method {method} in {value.model}", str(error))
    yield from distributed(method, variables, config)


def adapter(folder: str | Path, variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """An adapter's folder: its tensors, its base model, and the servers that take it.

    Raises:
        ConfigError: the folder holds no readable adapter.
    """
    from ziggurat.analysis import collect
    from ziggurat.host.saved.folder import adapter_config
    from ziggurat.training.model.meta import bare_config

    config = adapter_config(folder)
    kind = kind_of(config)
    method = kind.lower()
    try:
        collected = collect(folder)
    except ConfigError as error:
        if "is an adapter of PEFT method" not in str(error):
            raise
        collected = None
        yield Finding("note", f"method {kind}", "its tensors were not examined; analysis doesn't read this method")
    for note in collected.notes if collected is not None else ():
        broken = "NaN" in note
        untrained = "never trained" in note
        yield Finding("error" if broken else "warning" if untrained else "note", "the adapter's tensors", note)
    base = str(config.base_model_name_or_path or "")
    if not base:
        yield Finding("warning", "base model", "the config doesn't say which", "give it when loading, and save again")
    else:
        if _is_embedded(Path(folder)):
            base = "embedded"
        elif os.path.isabs(base):
            yield Finding(
                "warning",
                f"base model {base}",
                "a path of one machine: elsewhere the adapter doesn't find its model",
                "set base_model_name_or_path in adapter_config.json to a hub name",
            )
        yield from base_model(base, method)
    try:
        base_config = bare_config(base) if base else None
    except (ConfigError, MissingExtraError):
        base_config = None
    yield from serving(folder, config, collected, base_config)
    yield from distributed(method, variables, config)


def _is_embedded(folder: Path) -> bool:
    """Whether the adapter's recipe names the embedded model, which each machine finds in its own packages."""
    from ziggurat.training.answers.load import read_run

    try:
        return read_run(folder)[0].model == "embedded"
    except ZigguratError:
        return False
