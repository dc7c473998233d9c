"""The pytest plugin of the runner: our config for the template's, local models, and the named exclusions.

What to run comes in the environment variable PEFT_SUITE, as JSON (see `__main__`).
"""

import importlib.util
import json
import os
import sys
import types
from collections import Counter
from functools import partial
from typing import Any

import peft
import pytest
import torch

import ziggurat
from tolerance import rounding

from .exclusions import Exclusion, fits, read_exclusions, read_needs
from .rewrite import Rewriter, parts
from .toys import add_layers

ASKED = json.loads(os.environ["PEFT_SUITE"])
CONFIG = getattr(ziggurat, ASKED["config"])
NEEDS = read_needs(ASKED["config"])
TEMPLATES = tuple(getattr(peft, name) for name in ASKED["templates"])
REWRITER = Rewriter(CONFIG, TEMPLATES, ASKED["rename"], NEEDS.without, NEEDS.variants, NEEDS.not_on)
USED: Counter[Exclusion] = Counter()

if importlib.util.find_spec("diffusers") is None:
    # Imported at the top of PEFT's test files, used only by tests of Stable Diffusion, which never run here.
    stand_in: Any = types.ModuleType("diffusers")
    stand_in.__version__, stand_in.StableDiffusionPipeline = "0.0.0", type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stand_in


class EveryModelIsCached(dict):
    """PEFT's tests go online for a model's first use; to them, every model has been used before."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


def quotes() -> Any:
    """In the place of the one data set that the tests ask the hub for."""
    from datasets import Dataset, DatasetDict

    texts = ["be yourself everyone else is already taken", "the quick brown fox", "w1 w2 w3 w4 w5 w6 w7"] * 20
    rows = {"quote": texts, "author": texts, "tags": [[text] for text in texts]}
    return DatasetDict({"train": Dataset.from_dict(rows)})


def skip_merging(*_: Any) -> None:
    """In the place of the question with which PEFT's tests pass over its own methods that can't merge."""
    pytest.skip(NEEDS.cannot_merge)


def pytest_configure(config: pytest.Config) -> None:
    for name in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", name)


def pytest_collectstart(collector: pytest.Collector) -> None:
    if not isinstance(collector, pytest.Module):
        return
    module = collector.obj
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and name.startswith("Test"):
            for cls in value.__mro__[:-1]:
                for function in vars(cls).values():
                    if callable(function):
                        REWRITER.function(function)
            REWRITER.function(value)
        elif callable(value) and name.startswith("test_"):
            REWRITER.function(value)
    if hasattr(module, "load_dataset_english_quotes"):
        module.load_dataset_english_quotes = quotes
    if NEEDS.layers:
        add_layers(module)
    if NEEDS.cannot_merge:
        for asked in (module, sys.modules.get(f"{module.__package__}.testing_common")):
            if hasattr(asked, "_skip_if_merging_not_supported"):
                asked._skip_if_merging_not_supported = skip_merging  # type: ignore[union-attr]
    helpers: Any = sys.modules.get(f"{module.__package__}.testing_utils")
    if helpers is not None:
        helpers._HUB_MODEL_ACCESSES = EveryModelIsCached()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that run on our config; those excluded have to fail, or the exclusion is out of date."""
    exclusions = read_exclusions(ASKED["config"])
    kept, dropped = [], []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        ours = any(part is CONFIG or isinstance(part, CONFIG) for value in params.values() for part in parts(value))
        (kept if ours else dropped).append(item)
    for item in kept:
        for exclusion in exclusions:
            if exclusion.matches(item.nodeid):
                USED[exclusion] += 1
                item.add_marker(pytest.mark.xfail(reason=exclusion.reason, strict=True))
                break
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Let the optimisers that a test makes go faster where the method needs it, and rounding be any processor's."""
    factors = [factor for pattern, factor in NEEDS.rates if fits(item.name, pattern)]
    sums = [(length, depth) for pattern, length, depth in NEEDS.rounding if fits(item.name, pattern)]
    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.optim.SGD, torch.optim.Adam) if factors else ():
            patch.setattr(torch.optim, kind.__name__, partial(faster, kind, factors[-1]))
        if sums:
            patch.setattr(torch, "allclose", partial(agree, *sums[-1]))
        return (yield)


def agree(length: int, depth: int, first: torch.Tensor, two: torch.Tensor, **_: float) -> bool:
    """In the place of torch.allclose, with a tolerance from the sums."""
    return bool((first - two).abs().max() <= two.abs().max() * rounding(length, depth, two.dtype))


def faster(kind: type[torch.optim.Optimizer], factor: float, parameters: Any, *, lr: float, **rest: Any) -> Any:
    """An optimiser of `kind` with `factor` times the rate."""
    return kind(parameters, lr=factor * lr, **rest)  # type: ignore[call-arg]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for exclusion, count in USED.items():
        terminalreporter.write_line(f"excluded {count:3d} x {exclusion.test}: {exclusion.reason}")
