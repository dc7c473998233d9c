"""TRL's trainers, for tasks whose model writes texts."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError, RecipeError

from ..data.pairs import encode_judged, encode_pairs
from ..data.template import asked_ids, chat_ids, end_of_turn
from ..data.tokens import encode_rows, streamed
from .arguments import Setup, Task
from .exact import exact_sft
from .preference import preference_trainer


def instructed(setup: Setup) -> Task:
    """SFTTrainer of instructions, conversations or plain text, and notes. Raises DataError, RecipeError."""
    from trl import SFTConfig, SFTTrainer

    recipe, base, examples = setup.recipe, setup.base, setup.examples
    check_tokenizer(setup)
    writer: Any = base.tokenizer
    how: dict[str, Any] = {"completion_only_loss": True}  # the mask decides, for all kinds of data
    collator = None
    if base.processor is None:
        train, validation, how["max_length"], notes = encode_rows(recipe, writer, base.model.config, examples)
        if examples.stream is not None:
            train = streamed(recipe, writer, how["max_length"], examples.stream)
    else:
        from ..model.seeing import ImageCollator, Writer, encode_images

        writer = Writer(base.processor)
        train, validation, _, notes = encode_images(recipe, writer, base.model.config, examples)
        collator, how = ImageCollator(writer), {"max_length": None, "remove_unused_columns": False}
    if examples.shape == "messages":
        notes += _template_notes(writer)
    arguments = SFTConfig(**setup.arguments, **how, pad_token=str(base.tokenizer.pad_token))
    reads = {"data_collator": collator, "processing_class": base.processor or base.tokenizer}
    return Task(setup.trainer(exact_sft(SFTTrainer), arguments, (train, validation), **reads), notes)


def preferring(setup: Setup) -> Task:
    """TRL's trainer of preferences, and notes. Raises DataError, RecipeError."""
    recipe, base, examples = setup.recipe, setup.base, setup.examples
    check_tokenizer(setup)
    encode_all = encode_judged if recipe.kind.rows == "judged" else encode_pairs
    train, validation, length, notes = encode_all(recipe, base.tokenizer, base.model.config, examples)
    if examples.shape == "messages" and recipe.writes:
        notes += _template_notes(base.tokenizer)
    return Task(preference_trainer(setup, train, validation, length), notes)


def check_tokenizer(setup: Setup) -> None:
    """Raises DataError or RecipeError for a tokenizer that can't join messages or end a text."""
    recipe, base, examples = setup.recipe, setup.base, setup.examples
    if examples.shape == "messages" and not getattr(base.processor or base.tokenizer, "chat_template", None):
        raise DataError(
            f"data.format: the tokenizer of {recipe.model} has no chat template to join messages with; "
            "use a chat model, or columns prompt and completion"
        )
    if not base.tokenizer.eos_token:
        raise RecipeError(f"model: the tokenizer of {recipe.model} has no end-of-text token, so answers could not end")


def _template_notes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Notes for other programs that use an adapter trained with this chat template."""
    prompt = [{"role": "user", "content": "Really?"}]
    opened, learned = chat_ids(tokenizer, prompt, add_generation_prompt=True), asked_ids(tokenizer, prompt)
    if len(learned) < len(opened):
        yield (
            f"the chat template's generation prompt ends in {tokenizer.decode(opened[len(learned) :])!r}, which its "
            "conversations lack: answers are learned, and asked for by `ziggurat predict`, without it; leave it out "
            "elsewhere, too"
        )
    end = end_of_turn(tokenizer)
    if end is None:
        yield "the chat template ends a turn by no token of its own, so answers end at the limit of their length"
    elif end != tokenizer.eos_token_id:
        yield (
            f"the chat template ends a turn by {tokenizer.convert_ids_to_tokens(end)}, and the tokenizer a text by "
            f"{tokenizer.eos_token}: `ziggurat predict` and merged models stop at either; let other programs stop there"
        )
