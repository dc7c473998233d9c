"""Instructions with an input: as the Alpaca prompt, and as a message."""

# The Alpaca prompt (tatsu-lab/stanford_alpaca, train.py), which MSPLoRA's instruction runs use: models that were
# tuned on it expect it to the letter.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
#: The end of the prompt, as run.json records it; a run without this record was trained with a line break.
TO_THE_LETTER, WITH_LINE_BREAK = "stanford_alpaca", "line break"


def alpaca_prompt(instruction: str, context: str | None = None, form: str = TO_THE_LETTER) -> str:
    """The Alpaca prompt of one instruction, with the input's section only where there is an input."""
    end = "\n" if form == WITH_LINE_BREAK else ""
    if context and context.strip():
        return _WITH_INPUT.format(instruction=instruction, input=context) + end
    return _WITHOUT_INPUT.format(instruction=instruction) + end


def with_context(text: str | None, context: str | None) -> str | None:
    """An instruction with its input, if it has one, as the content of a message."""
    return f"{text}\n\n{context}" if context and context.strip() else text
