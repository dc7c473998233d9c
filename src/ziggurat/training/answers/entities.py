"""The entities that a token classifier finds in texts."""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from ziggurat.recipe.schema import SCORED_LENGTH

from ..data.encode import longest
from ..data.tags import OUTSIDE, encode_words
from ..loop.entities import entities
from .load import Loaded

#: The units of a text whose words aren't given: words, and single punctuation characters.
_WORD = re.compile(r"\w+|[^\w\s]")


def tags_of(loaded: Loaded, rows: Sequence[list[str]], batch: int) -> Iterator[list[str]]:
    """The likeliest tag of each word, from its first token; O for words beyond the maximum length."""
    config: Any = loaded.model.config
    length = longest(loaded.tokenizer, config, loaded.recipe.data.max_length or SCORED_LENGTH)
    columns, firsts, _ = encode_words(rows, loaded.tokenizer, length)
    for words, of_row, scores in zip(rows, firsts, loaded.scores(columns, batch), strict=True):
        tags = [OUTSIDE] * len(words)
        for word, place in zip(of_row, scores.argmax(-1).tolist(), strict=True):
            if word is not None:
                tags[word] = str(loaded.head.label_names[place])
        yield tags


def found_entities(
    loaded: Loaded, texts: Sequence[str | list[str]], batch: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each text with its entities: kind, text, and their first and last (excluded) character in the text.

    Lists of words are joined by blanks, texts are split into words and punctuation.
    """
    shown = [text if isinstance(text, str) else " ".join(text) for text in texts]
    spans = [_spans(text) for text in texts]
    words = [[text[start:end] for start, end in of_text] for text, of_text in zip(shown, spans, strict=True)]
    for text, of_text, tags in zip(shown, spans, tags_of(loaded, words, batch), strict=True):
        places = [
            (kind, of_text[first][0], of_text[end - 1][1])
            for kind, first, end in sorted(entities(tags), key=lambda span: span[1])
        ]
        yield text, [{"kind": kind, "text": text[a:b], "start": a, "end": b} for kind, a, b in places]


def _spans(text: str | list[str]) -> list[tuple[int, int]]:
    if isinstance(text, str):
        return [match.span() for match in _WORD.finditer(text)]
    ends = accumulate(len(word) + 1 for word in text)
    return [(end - 1 - len(word), end - 1) for word, end in zip(text, ends, strict=True)]
