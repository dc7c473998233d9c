"""The token ids of instruction data with their loss mask, cut to one length; everything lost is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError
from ziggurat.recipe.schema import MOST_LENGTH, Recipe

from .chat import THOUGHTS
from .encode import Encoded, longest, percentile, spread
from .examples import Examples
from .faults import Faults
from .template import answer_tokens, common_start, rendered

if TYPE_CHECKING:
    from datasets import Dataset

    from .streams import Stream

#: A length derived from the data is a multiple of this.
STEP = 64

#: Token ids of a row, and a mask that is 1 for those of its answers.
Row = tuple[list[int], list[int]]


def encode_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, examples: Examples) -> Encoded:
    """Training and validation rows as `input_ids` and `completion_mask`, their greatest length, and notes.

    The mask is 1 for tokens that are learned. The notes say how long rows are, and how many of them are cut or have no
    answer left.

    Raises DataError that counts all rows which the chat template refuses, or if no row of a part has an answer left.
    """
    notes: list[str] = []
    parts = [(tokens_of(recipe, tokenizer, table, word, notes), word) for table, word in examples.parts]
    lengths = [len(ids) for ids, _ in parts[0][0]]
    notes.append(spread(lengths, "training rows"))
    packed = recipe.data.packing
    length = length_of(recipe, tokenizer, config, MOST_LENGTH if packed else percentile(lengths, 95), notes)
    train, validation = (
        _packed(rows, length, word, notes) if packed else _cut(recipe, rows, length, word, notes)
        for rows, word in parts
    )
    return Encoded(train, validation, length, notes)


def streamed(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, length: int, stream: Stream) -> Any:
    """The rows of a stream as an iterable data set of `input_ids` and `labels`, cut to `length` tokens, or packed.

    Rows without a token to learn are left out and counted in the stream.
    """
    from datasets import Features, IterableDataset, List, Value

    def rows() -> Iterator[dict[str, list[int]]]:
        buffer: list[int] = []
        for row in stream:
            ids, mask = _encoded(tokenizer, row, recipe.data.loss, Counter())
            if recipe.data.packing:
                buffer += ids
                while len(buffer) >= length:
                    piece, buffer = buffer[:length], buffer[length:]
                    yield {"input_ids": piece, "labels": piece}
                continue
            ids, mask = ids[:length], [1] * len(ids) if recipe.data.loss == "all" else mask[:length]
            labels = [token if learned else -100 for token, learned in zip(ids, mask, strict=False)]
            if any(label != -100 for label in labels[1:]):
                yield {"input_ids": ids, "labels": labels}
            else:
                stream.lost[f"have no answer within {length} tokens"] += 1

    kinds = {name: List(Value("int64")) for name in ("input_ids", "labels")}
    return IterableDataset.from_generator(rows, features=Features(kinds))


def length_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    needed: int,
    notes: list[str],
    key: str = "max_length",
) -> int:
    """`data.max_length` (or `data.max_target`), or the length of most rows; at most the model's positions."""
    limit = getattr(recipe.data, key)
    length = longest(tokenizer, config, limit or min(-(-needed // STEP) * STEP, MOST_LENGTH))
    if limit is None:
        why = "which at least 95% of the training rows fit into"
        if length < needed:
            why = f"the most {'without data.' + key if length == MOST_LENGTH else f'that {recipe.model} takes'}"
        notes.append(f"data.{key} is not given: {length} tokens, {why}")
    elif length < limit:
        notes.append(f"data.{key} {limit} lowered to {length}, all this model can take")
    return length


def tokens_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, table: Dataset, word: str, notes: list[str]
) -> list[Row]:
    """The token ids and the answers' mask of every row; `notes` receives the parts that the chat template leaves
    out."""
    lost: Counter[str] = Counter()
    faults = Faults(f"the {word} rows of {recipe.data.train}", len(table))
    rows = []
    for row in table:
        assert isinstance(row, dict)
        try:
            rows.append(_encoded(tokenizer, row, recipe.data.loss, lost))
        except DataError as error:
            faults.add(row["row"] - 1, str(error))
    faults.settle(table, drop=None)
    notes += [
        f"{count} of {len(table)} {word} rows have {part}, which the chat template leaves out"
        for part, count in sorted(lost.items())
        if count
    ]
    return rows


def _encoded(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], loss: str, lost: Counter[str]) -> Row:
    if "messages" in row:
        return _conversation(tokenizer, row, loss, lost)
    if "text" in row:
        ids = _ids(tokenizer, row["text"], end=True)
        return ids, [1] * len(ids)
    whole = _ids(tokenizer, row["prompt"] + row["completion"], end=True)
    start = common_start(_ids(tokenizer, row["prompt"]), whole)
    return whole, [int(place >= start) for place in range(len(whole))]


def _conversation(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], loss: str, lost: Counter[str]) -> Row:
    messages, tools = json.loads(row["messages"]), json.loads(row["tools"])
    text, ids, mask = answer_tokens(tokenizer, messages, tools, last=loss == "last", since=row["learned"])
    for part, keys in (("calls of tools", ("tool_calls",)), ("thoughts", THOUGHTS)):
        bare = [{key: value for key, value in message.items() if key not in keys} for message in messages]
        lost[part] += bare != messages and rendered(tokenizer, bare, tools) == text
    lost["tools"] += bool(tools) and rendered(tokenizer, messages) == text
    return ids, mask


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, end: bool = False) -> list[int]:
    """Token ids of a text, followed by one end-of-text token if `end`."""
    stop = str(tokenizer.eos_token) if end and not text.endswith(str(tokenizer.eos_token)) else ""
    return list(tokenizer(text + stop, verbose=False)["input_ids"])


def _cut(recipe: Recipe, rows: Iterable[Row], length: int, word: str, notes: list[str]) -> Dataset:
    """Rows of at most `length` tokens; those without a token to learn are left out. DataError if none is left."""
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    total = cut = unanswered = 0
    for ids, mask in rows:
        total, cut = total + 1, cut + (len(ids) > length)
        ids, mask = ids[:length], mask[:length]
        # The first token has no context to be predicted from, so it isn't learned.
        unanswered += not any(mask[1:])
        learned = [1] * len(ids) if recipe.data.loss == "all" else mask
        if any(learned[1:]):
            columns["input_ids"].append(ids)
            columns["completion_mask"].append(learned)
    tell_of_cuts(recipe, length, word, total, cut, unanswered, total - len(columns["input_ids"]), notes)
    return Dataset.from_dict(columns)


def tell_of_cuts(
    recipe: Recipe, length: int, word: str, total: int, cut: int, unanswered: int, gone: int, notes: list[str]
) -> None:
    """Note how many of `total` rows are cut, have no answer left, and are left out for it. DataError if all are."""
    if gone == total:
        do = "raise it" if recipe.data.max_length == length else f"{recipe.model} takes no more, so shorten the prompts"
        raise DataError(
            f"data.max_length: none of the {total} {word} rows has an answer within {length} tokens, which the prompts "
            f"fill; {do}"
        )
    if cut:
        notes.append(f"{cut} of {total} {word} rows are longer than {length} tokens and were cut")
    if unanswered:
        consequence = " and are left out" if gone else ""
        notes.append(f"{unanswered} of {total} {word} rows have no answer within {length} tokens{consequence}")


def _packed(rows: Iterable[Row], length: int, word: str, notes: list[str]) -> Dataset:
    """All rows joined and cut into pieces of `length` tokens."""
    from datasets import Dataset
    from trl import pack_dataset

    ids = [ids for ids, _ in rows]
    pieces = pack_dataset(Dataset.from_dict({"input_ids": ids}), length, strategy="wrapped")
    notes.append(f"{len(ids)} {word} rows are packed into {len(pieces)} of {length} tokens")
    return pieces.map(lambda piece: {"completion_mask": [1] * len(piece["input_ids"])})
