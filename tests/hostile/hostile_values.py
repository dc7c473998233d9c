"""Values that a stranger may write into a config, and the errors that may follow."""

from typing import Any

from hypothesis import strategies as st

from ziggurat.errors import ZigguratError

#: Numbers, texts and structures that no field wants, or that one wants and another doesn't.
SCALARS: list[Any] = [
    None,
    True,
    False,
    *(0, 1, -1, 2, 3, 8, 255, 4096, 10**6, 10**9, 2**63, -(10**9), 10**400),
    *(0.0, -0.5, 0.5, 1.5, 8.0, 1e9, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "no",
        "true",
        "8",
        "nan",
        "none",
        "all",
        "lora_only",
        "query",
        "all-linear",
        "value.weight",
        "a/b",
        "../..",
        "/",
    ),
    *(
        "(",
        "(a+)+$",
        "(.*)*x",
        ".*.*.*.*.*.*x",
        "x{1,9999999}",
        "ünïcode",
        "日本",
        "\u0000",
        "\ud7ff",
        "a" * 5000,
        "blocks",
    ),
]
KEYS = ["name", "groups", "r", "lora_alpha", "stacks", "spans", "injected", "done", "blocks", "query", "../x", ""]

values = st.recursive(
    st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
) | st.sampled_from(
    [
        [{"name": "t", "groups": 1}] * 10**5,
        [{"name": "t", "groups": list(range(10**5))}],
        [[0, 10**9]],
        [[-3, 2]],
        [[0, 1], [1, 2]],
        list(range(10**5)),
        {"stacks": {"blocks": {"spans": [[0, 10**9]], "injected": []}}, "done": 0},
        {"stacks": {"blocks": {"spans": [[0, 3]], "injected": [-1]}}, "done": -1},
        {str(number): 10**9 for number in range(2000)},
    ]
)

#: Ours, and the words PEFT has for the same: nothing to adapt, a task it doesn't know, a size that differs.
PEFTS_OWN = (
    "Please specify `target_modules`",
    "No `target_modules` passed",
    "Target module",
    "No modules were targeted",
    "Invalid task type",
    "size mismatch",
    "layers_pattern",
)


def check_error(error: Exception) -> None:
    """Fail unless `error` is one that a user can act on."""
    text = str(error)
    assert text.strip(), f"{type(error).__name__} without a word"
    clear = isinstance(error, ZigguratError) or (
        isinstance(error, ValueError | RuntimeError) and any(words in text for words in PEFTS_OWN)
    )
    assert clear, f"{type(error).__name__}: {text[:300]}"
