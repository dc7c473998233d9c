"""Servers for an adapter: vLLM's and llama.cpp's rules, judged by its folder and its base's config."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ziggurat.host.method import kind_of, method_of

from .facts import METHODS, fact
from .finding import Finding, cell

#: Words in the names of tensors that are parts of the update of one of PEFT's own methods.
_PEFTS_OWN = ("lora_", "vera_", "lily_")
_MERGE = "merge into the model (`ziggurat merge`) and serve that"


def is_decoder(config: Any, task: str | None) -> bool | None:
    """Whether a base (transformers' config, or None) writes text from left to right; None: unknown."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"):
        return False
    if config is None:
        return True if task == "CAUSAL_LM" else None
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def serving(folder: str | Path, config: Any, collected: Any, base: Any) -> Iterator[Finding]:
    """Findings about servers. `collected`: the adapter's components, or None; `base`: the base's config, or None."""
    from ziggurat.export import SERVING_RANKS
    from ziggurat.host.saved.folder import tensor_shapes

    kind = kind_of(config)
    method = kind.lower()
    if method in METHODS and fact("llama_cpp").cells[method] == "no":
        for key in ("vllm", "llama_cpp"):
            yield from cell(key, method)
        return
    names = list(tensor_shapes(folder))
    registered = method_of(config)
    prefixes = (registered.prefix,) if registered is not None else _PEFTS_OWN
    extra = [name for name in names if not any(word in name for word in prefixes)]
    if extra:
        yield Finding(
            "warning",
            f"{len(extra)} tensors that are no factor pairs ({extra[0]}, ...)",
            "vLLM and llama.cpp reject modules_to_save and trained biases",
            _MERGE,
        )
    if collected is None:
        yield Finding("note", f"serving {kind}", "vLLM and llama.cpp apply LoRA's factor pairs only", _MERGE)
        return
    task = getattr(config.task_type, "value", config.task_type)
    if is_decoder(base, task) is False:
        model_kind = base.model_type if base is not None else str(task)
        yield Finding(
            "warning",
            f"serving an adapter of {model_kind}",
            "llama.cpp applies adapters to decoders that write text, vLLM to models that it marks for LoRA, mostly "
            "decoders",
            "merge into the model (`ziggurat merge`), which some servers take whole, or answer with `ziggurat predict`",
        )
        return
    if kind == "LORA":
        outside = sorted(
            {name.partition(".lora_")[0] for name in names if not any(p.isdigit() for p in name.split("."))}
        )
        outside = [name.removeprefix("base_model.model.") for name in outside if name not in extra]
        if outside:
            yield Finding(
                "warning",
                f"targets outside the layers ({', '.join(outside[:3])})",
                "vLLM takes linear layers of the stack, heads or embeddings of few models; llama.cpp no embeddings",
                _MERGE,
            )
    if kind == "LORA" or (registered is not None and registered.card.merges):
        composed = [c for c in collected.components if not c.stored] or collected.components
        yield from _ranks(kind, {c.rank for c in composed}, SERVING_RANKS)
    if kind == "LORA":
        yield from _scales(config)


def _ranks(kind: str, ranks: set[int], allowed: Any) -> Iterator[Finding]:
    most = max(ranks, default=0)
    if most > allowed[-1]:
        yield Finding("error", f"rank {most}", f"vLLM allows at most {allowed[-1]}", "merge into the model")
    elif kind == "LORA" and (len(ranks) > 1 or most not in allowed):
        yield Finding(
            "note",
            f"ranks {sorted(ranks)}",
            f"vLLM's --max-lora-rank takes {', '.join(map(str, allowed))}",
            "pass the next larger one",
        )
    elif kind != "LORA":
        fitting = next(r for r in allowed if r >= most)
        yield Finding(
            "note",
            f"served as rank {fitting}",
            f"the update of each linear layer has rank {most} or less, filled up to one that vLLM allows",
            "ziggurat export --serving",
        )


def _scales(config: Any) -> Iterator[Finding]:
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
