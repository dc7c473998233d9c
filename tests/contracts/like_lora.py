"""What LoRA's config and model can do, and which methods can: the second table of docs/combinations.md.

A cell comes from the test behind its row: "yes" where the test runs with that method, "no" where `REFUSED`, which the
test reads too, has it. `pages.py` writes the table anew.
"""

import importlib
from collections.abc import Iterator

import pages
from methods_table import METHODS
from ziggurat.host.method import METHODS as REGISTERED

#: What is offered -> the test that shows it, as module and function.
ROWS = {
    "`from_lora(lora_config, **more)`": "test_field:test_a_config_of_lora_becomes_one_of_the_method",
    "`use_rslora`": "test_like_lora:test_rslora_divides_by_the_root_of_the_rank",
    "`rank_pattern`": "test_like_lora:test_a_rank_of_its_own",
    "`alpha_pattern`": "test_like_lora:test_an_alpha_of_its_own_scales_one_module",
    "`layers_to_transform`, `exclude_modules`": "test_like_lora:test_layers_and_modules_are_left_out",
    "`modules_to_save`": "test_like_lora:test_a_head_is_trained_and_saved_whole",
    "`trainable_token_indices`": "test_field:test_rows_of_the_embedding_train_along",
    "`add_weighted_adapter`: linear, cat": "test_adapters:test_weighted_sums_are_exact",
    "`add_weighted_adapter`: svd, ties, dare, magnitude_prune": "test_adapters:test_combinations_are_pefts",
    "a batch with an adapter for each sample": "test_adapters:test_each_sample_with_its_own_adapter",
    "`ziggurat.hotswap_adapter`": "test_like_lora:test_a_swapped_adapter_computes_as_the_loaded_one",
    "`ziggurat.create_loraplus_optimizer`": "test_like_lora:test_lora_plus_gives_the_output_side_its_rate",
}
_AROUND = "a path goes around a whole layer"
#: (test, method) -> why the method can't.
REFUSED = {
    ("test_a_rank_of_its_own", "lor2c"): _AROUND,
    ("test_an_alpha_of_its_own_scales_one_module", "lor2c"): _AROUND,
    ("test_lora_plus_gives_the_output_side_its_rate", "loraxs"): "nothing on the output side trains",
}
#: The methods that make a low-rank update.
PAIRS = [name for name in METHODS if REGISTERED[name.upper()].pair is not None]
BEGIN, END = "<!-- like lora -->\n", "<!-- end of like lora -->"


def methods_of(test: str) -> set[str]:
    """The methods that a test is run with."""
    module, _, name = test.partition(":")
    marks = getattr(importlib.import_module(f"contracts.{module}"), name).pytestmark
    values = [mark.args[1] for mark in marks if mark.name == "parametrize" and "method" in mark.args[0]]
    return {value if isinstance(value, str) else value[0] for row in values for value in row}


def table() -> str:
    """The table, in Markdown."""
    names = [REGISTERED[name.upper()].card.shown for name in PAIRS]
    return "\n".join([f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names), *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    for what, test in ROWS.items():
        tested, name = methods_of(test), test.partition(":")[2]
        refused = {method: f"no: {why}" for (of, method), why in REFUSED.items() if of == name}
        cells = [refused.get(method, "yes") if method in tested else "untested" for method in PAIRS]
        yield f"| {what} | {' | '.join(cells)} |"


def written_into(page: str) -> str:
    """The page with the table between its marks."""
    return pages.written_into(page, BEGIN, table(), END)
