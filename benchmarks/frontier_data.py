"""Blocks of tokens for frontier.py: pages of plain text, answers to instructions, English passages."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: No page gives more blocks than this, unless the plan says so: one long manual would else be most of a split.
MOST_BLOCKS_A_PAGE = 4
#: A label that counts for nothing in the loss.
IGNORED = -100
#: Decides which pages and answers lie in which split; the same for all runs, whatever their seed.
SPLIT_SEED = 0


class Rows(NamedTuple):
    """Blocks of equal length (rows, tokens): what the model reads, and what it has to predict."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.ids)

    def at(self, rows: Tensor | slice) -> dict[str, Tensor]:
        return {"input_ids": self.ids[rows], "labels": self.labels[rows]}


class Splits(NamedTuple):
    """No page and no answer lies in two of them. Rates are chosen on `tuning`, results are read on `reported`."""

    training: Rows
    tuning: Rows
    reported: Rows


def pages(folder: Path, tokenizer: Any, sizes: dict[str, int], tokens: int) -> Splits:
    """Blocks of the `.txt` files in `folder`, one file a page; lines are joined, and the first one is a page's head.

    `sizes`: blocks of each split, and, as `training_a_page`, how many of them one page may give.
    """
    files = sorted(folder.glob("*.txt"))
    random.Random(SPLIT_SEED).shuffle(files)
    texts = (file.read_text(encoding="utf-8").lstrip().partition("\n")[2] for file in files)
    return _split((_blocks(text, tokenizer, tokens) for text in texts), sizes, tokens, str(folder))


def answers(file: Path, tokenizer: Any, sizes: dict[str, int], tokens: int) -> Splits:
    """Instructions with their answers from a table with Alpaca's columns; only the answer counts in the loss.

    Those that fit into a block, each in one of its own, padded at its end.
    """
    import pandas

    table = pandas.read_parquet(file).sample(frac=1, random_state=SPLIT_SEED)
    return _split((_answer(row, tokenizer, tokens) for row in table.itertuples()), sizes, tokens, str(file))


def passages(file: Path, tokenizer: Any, number: int, tokens: int) -> Rows:
    """The first block of each distinct text in the column `passage` of a table: plain English, nothing to learn."""
    import pandas

    texts = pandas.read_parquet(file)["passage"].drop_duplicates().sample(frac=1, random_state=SPLIT_SEED)
    blocks = [block for text in texts for block in _blocks(text, tokenizer, tokens)[:1]][:number]
    if len(blocks) < number:
        raise SystemExit(f"{file}: {len(blocks)} passages of {tokens} tokens, {number} are needed.")
    return _rows([(block, block) for block in blocks])


def _blocks(text: str, tokenizer: Any, tokens: int) -> list[list[int]]:
    ids = tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"]
    return [ids[i * tokens : (i + 1) * tokens] for i in range(len(ids) // tokens)]


def _answer(row: Any, tokenizer: Any, tokens: int) -> list[tuple[list[int], list[int]]]:
    question = f"{row.instruction}\n{row.input}".strip() + "\n\nAnswer:"
    prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f" {row.output}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    rest = tokens - len(prompt) - len(answer)
    if rest < 0:
        return []
    padding = [tokenizer.eos_token_id] * rest
    return [(prompt + answer + padding, [IGNORED] * len(prompt) + answer + [IGNORED] * rest)]


def _split(texts: Iterable[list[Any]], sizes: dict[str, int], tokens: int, source: str) -> Splits:
    """Whole texts go to `reported` until it is full, then to `tuning`, then to `training`."""
    stream: Iterator[list[Any]] = iter(texts)
    splits = {}
    for name in ("reported", "tuning", "training"):
        rows: list[Any] = []
        while len(rows) < sizes[name]:
            text = next(stream, None)
            if text is None:
                raise SystemExit(f"{source}: {len(rows)} blocks of {tokens} tokens for {name}, {sizes[name]} needed.")
            most = sizes.get(f"{name}_a_page", MOST_BLOCKS_A_PAGE)
            rows += [row if isinstance(row, tuple) else (row, row) for row in text[:most]]
        splits[name] = _rows(rows[: sizes[name]])
    return Splits(**splits)


def _rows(pairs: list[tuple[list[int], list[int]]]) -> Rows:
    return Rows(torch.tensor([ids for ids, _ in pairs]), torch.tensor([labels for _, labels in pairs]))
