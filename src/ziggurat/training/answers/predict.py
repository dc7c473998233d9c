"""Answers of a trained adapter."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError
from ziggurat.nearest import missing_path
from ziggurat.recipe.schema import SCORED_LENGTH
from ziggurat.recipe.tasks import WRITES

from ..data.alpaca import WITH_LINE_BREAK, alpaca_prompt, with_context
from ..data.chat import IMAGE, conversation, tools_of, with_system
from ..data.encode import encode_texts, longest
from ..data.examples import text_columns
from ..data.faults import Faults, RowFault
from ..data.images import Images, undecoded
from ..data.instruct import cells_of, column_of, to_rows
from ..data.readers import encoding_of, read_lines
from ..data.sources import source_ids
from ..data.tables import read_table, require_column, texts_of
from ..data.tags import words_in
from ..data.template import asked_ids, chat_ids
from ..model.generate import Sampling, generate
from .load import Loaded, load_adapter_model


@dataclass(frozen=True)
class Prediction:
    """One answer: a class, several classes, entities, a number or a text; for classes also the probability of each."""

    text: str
    answer: str | float | list[Any]
    shares: dict[str, float] | None = None

    def to_json(self) -> str:
        values = {"text": self.text, "answer": self.answer}
        return json.dumps(values if self.shares is None else {**values, "shares": self.shares}, ensure_ascii=False)

    def to_line(self, alone: bool = True) -> str:
        """`positive  (positive 0.93, negative 0.07)`; unless `alone`, in one line followed by its text."""
        shown = f"{self.answer:.4f}" if isinstance(self.answer, float) else str(self.answer)
        if isinstance(self.answer, list):
            names = [part if isinstance(part, str) else f"{part['kind']}: {part['text']}" for part in self.answer]
            shown = ", ".join(names) or "none"
        shown, text = (part if alone else part.replace("\n", "\\n") for part in (shown, self.text))
        if self.shares is not None:
            ranked = sorted(self.shares.items(), key=lambda item: -item[1])[:5]
            shown += "  (" + ", ".join(f"{name} {share:.3f}" for name, share in ranked) + ")"
        return shown if alone else f"{shown}\t{text}"


@dataclass(frozen=True)
class Conversation:
    """Messages (with a system prompt and earlier turns) to be answered, and tools that the answer may call.

    `images` are the sources of the images that the texts mark by `IMAGE`; `seen_with` makes such a question.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)


def predict(
    adapter: str | Path | Loaded,
    texts: Sequence[str | list[str] | Conversation],
    second: Sequence[str] | None = None,
    *,
    batch: int | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    system: str | None = None,
) -> list[Prediction]:
    """The adapter's answers to texts, pairs of texts or conversations, in order; see `predict_each`."""
    sampling = sampling or Sampling(tokens=max_new_tokens)
    return list(predict_each(adapter, texts, second, batch=batch, sampling=sampling, system=system))


def predict_each(
    adapter: str | Path | Loaded,
    texts: Sequence[str | list[str] | Conversation],
    second: Sequence[str] | None = None,
    *,
    batch: int | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
) -> Iterator[Prediction]:
    """The answers one after the other, as each batch of `batch` texts is done (32 to score, 8 to write).

    Classes come with softmax probabilities (multilabel: all above 1/2, with sigmoid ones), regression with the number,
    tokens with entities (lists of words are taken as they are), instruct with text, by `sampling`; `system` is the
    system prompt of texts that become conversations. Raises DataError for a wrong number of texts, or for a
    conversation if the adapter was not trained on conversations.
    """
    loaded = adapter if isinstance(adapter, Loaded) else load_adapter_model(adapter)
    if not texts:
        raise DataError("no text to predict")
    shape, writes = loaded.run.get("shape"), loaded.head.task in WRITES
    if loaded.processor is None and any(isinstance(text, Conversation) and text.images for text in texts):
        raise DataError("this adapter was trained on texts alone: it takes no images")
    if shape != "messages" and (system is not None or any(isinstance(text, Conversation) for text in texts)):
        raise DataError("this adapter was not trained on conversations: it takes no system prompt and no earlier turns")
    if writes and second is not None and shape in ("prompt", "text", "source"):
        raise DataError(f"this adapter was trained on {shape}s, which have no input: give one text")
    if not writes and loaded.head.pair and second is None:
        raise DataError(
            f"this adapter compares two texts ('{loaded.recipe.data.text}' and '{loaded.recipe.data.text_pair}'): "
            "give a second one"
        )
    if not writes and not loaded.head.pair and second is not None and loaded.head.task != "reward":
        raise DataError("this adapter takes one text, two were given")
    if second is not None and len(second) != len(texts):
        raise DataError(f"{len(texts)} first texts, but {len(second)} second ones")
    if loaded.head.task == "tokens":
        from .entities import found_entities

        return (Prediction(*tags) for tags in found_entities(loaded, texts, batch or 32))  # type: ignore[arg-type]
    if loaded.head.task == "reward":
        from .rewards import answered, rewards_of

        rows: Any = texts if isinstance(texts[0], dict) else answered(loaded, [shown(text) for text in texts], second)
        rated = [str(row.get("completion") or json.loads(row["messages"])[-1]["content"]) for row in rows]
        return (Prediction(*pair) for pair in zip(rated, rewards_of(loaded, rows, batch or 32, []), strict=True))
    if not writes:
        return _score(loaded, [shown(text) for text in texts], second, batch or 32)
    contexts = second if second is not None else [None] * len(texts)
    prompts = [_prompt_of(loaded, text, context, system) for text, context in zip(texts, contexts, strict=True)]
    how: dict[str, Any] = {"batch": batch or 8, "name": loaded.recipe.model}
    answers = generate(loaded.model, loaded.writer, prompts, sampling or Sampling(), **how)
    return (Prediction(shown(text), answer) for text, answer in zip(texts, answers, strict=True))


def shown(text: str | list[str] | Conversation) -> str:
    """A text, or the last message of a conversation."""
    if isinstance(text, list):
        return " ".join(text)
    return text if isinstance(text, str) else str(text.messages[-1]["content"]).replace(IMAGE, "")


def _score(loaded: Loaded, texts: Sequence[str], second: Sequence[str] | None, batch: int) -> Iterator[Prediction]:
    config: Any = loaded.model.config
    length = longest(loaded.tokenizer, config, loaded.recipe.data.max_length or SCORED_LENGTH)
    separate = loaded.head.pooling == "mean" and loaded.head.pair
    columns, _ = encode_texts(texts, second, loaded.tokenizer, length, separate=separate)
    several = loaded.head.task == "multilabel"
    for text, scores in zip(texts, loaded.scores(columns, batch), strict=True):
        if loaded.head.task == "regression":
            yield Prediction(text, float(scores[0]))
            continue
        probabilities = (scores.sigmoid() if several else scores.softmax(-1)).tolist()
        shares = dict(zip(loaded.head.label_names, probabilities, strict=True))
        likely = [name for name, share in shares.items() if share > 0.5]
        yield Prediction(text, likely if several else max(shares, key=lambda name: shares[name]), shares)


def seen_with(text: str, images: Sequence[str | Path]) -> Conversation:
    """A question about images, which stand before it. Raises DataError for files that are no images."""
    try:
        reader = Images("--image", "")
        messages, sources = reader.placed([{"role": "user", "content": text}], [], [str(path) for path in images])
    except RowFault as fault:
        raise DataError(f"--image: {fault}") from fault
    return Conversation(messages, images=sources)


def _prompt_of(loaded: Loaded, text: str | list[str] | Conversation, context: str | None, system: str | None) -> Any:
    """One question as a prompt of `generate`, in the form that the adapter was trained on."""
    shape = loaded.run.get("shape")
    if shape == "messages" or isinstance(text, Conversation):
        talk = _talk(text, context, system)
        if loaded.processor is not None:
            return loaded.writer.asked(talk.messages, talk.tools, talk.images)
        if loaded.recipe.kind.rows == "prompts":  # its completions followed the whole generation prompt
            return chat_ids(loaded.tokenizer, talk.messages, talk.tools, add_generation_prompt=True)
        return asked_ids(loaded.tokenizer, talk.messages, talk.tools)
    prompt = text = shown(text)
    if shape == "source":
        return source_ids(loaded.recipe, loaded.tokenizer, [text])[0]
    if shape == "alpaca":
        prompt = alpaca_prompt(text, context, form=loaded.run.get("prompt_form", WITH_LINE_BREAK))
    return list(loaded.tokenizer(prompt)["input_ids"])


def _talk(text: str | list[str] | Conversation, context: str | None, system: str | None) -> Conversation:
    """A text as a conversation, after the system prompt if there is one."""
    if isinstance(text, Conversation):
        return replace(text, messages=with_system(text.messages, system))
    return Conversation(with_system([{"role": "user", "content": with_context(shown(text), context)}], system))


def asked_of(loaded: Loaded, messages: list[dict[str, Any]], system: str | None = None) -> Any:
    """A conversation as a prompt of `generate`; for an adapter trained without any, its last message."""
    talk = Conversation(messages) if loaded.run.get("shape") == "messages" else messages[-1]["content"]
    return _prompt_of(loaded, talk, None, system)


def _question_columns(loaded: Loaded, table: Any, source: str) -> tuple[str, str | None]:
    """The columns of the questions and of their inputs."""
    shape = loaded.run.get("shape")
    names = {"source": ["source"], "alpaca": ["instruction", "prompt"]}.get(str(shape), ["prompt", "instruction"])
    columns = (column_of(loaded.recipe, name, table, source) for name in names)
    first = next((column for column in columns if column is not None), names[0])
    return first, None if shape in ("source", "prompt", "text") else column_of(loaded.recipe, "input", table, source)


def read_texts(file: Path, loaded: Loaded) -> tuple[list[Any], list[str] | None]:
    """Texts of a .txt file (one a line), or of a table with the columns the adapter was trained on.

    Conversations are continued; the last answer of one that ends in an answer is replaced.

    Raises DataError for a missing file, missing columns, conversations that can't be read (all at once), or a .txt file
    if two texts are needed.
    """
    data = loaded.recipe.data
    if file.suffix.lower() == ".txt":
        if not file.is_file():
            raise DataError(missing_path(file))
        if loaded.head.task == "reward":
            raise DataError("this adapter rates answers: give a table with prompts and completions, or conversations")
        if loaded.head.pair:
            raise DataError(f"this adapter compares two texts: give a table with '{data.text}' and '{data.text_pair}'")
        return read_lines(file), None
    columns, rates = text_columns(loaded.recipe), loaded.head.task == "reward"
    talks = loaded.run.get("shape") == "messages"
    encoding = encoding_of(str(file), data.encoding)
    table = read_table(str(file), texts=columns, nested=columns if talks or rates else (), encoding=encoding)
    if rates:
        return [dict(row) for row in to_rows(loaded.recipe, table, str(file))[0]], None
    if loaded.head.task == "tokens":
        require_column(table, columns[0], "--file", str(file))
        return [words_in(cell) for cell in table[columns[0]]], None
    if talks and (chats := _chats(loaded, table, str(file))) is not None:
        return _conversations(loaded, table, chats, str(file)), None
    if loaded.head.task in WRITES:
        first, second = _question_columns(loaded, table, str(file))
    else:
        first, second = data.text, data.text_pair
    for column in (first, second):
        if column is not None:
            require_column(table, column, "--file", str(file))
    texts = texts_of(table, first, str(file))
    if second is None:
        return texts, None
    if loaded.head.task in WRITES:  # an instruction may have no input
        return texts, ["" if text is None else str(text) for text in table[second]]
    return texts, texts_of(table, second, str(file))


def _chats(loaded: Loaded, table: Any, source: str) -> str | None:
    """The column of conversations, or of prompts that are messages, as in TRL's data; None if there is neither."""
    column = column_of(loaded.recipe, "messages", table, source)
    prompts = column_of(loaded.recipe, "prompt", table, source) if column is None else None
    if prompts is not None and any(str(prompt).startswith("[{") for prompt in table[prompts]):
        return prompts
    return column


def _conversations(loaded: Loaded, table: Any, column: str, source: str) -> list[Conversation]:
    columns = {name: column_of(loaded.recipe, name, table, source) for name in ("tools", "system", "images")}
    faults = Faults(source, len(table))
    folder = loaded.recipe.data.image_folder  # it may exist on another machine only
    folder = folder if folder is not None and Path(folder).is_dir() else None
    images = Images(source, folder) if loaded.processor is not None else None

    def read(row: Any) -> Conversation:
        cells, named = cells_of(row, columns), None if images is None else list[Any]()
        messages, _ = conversation(row[column], loaded.recipe.data, named)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise RowFault("no message to be answered")
        sources = []
        if images is not None:
            messages, sources = images.placed(messages, named or [], cells["images"])
        return Conversation(with_system(messages, cells["system"] or None), tools_of(cells["tools"]), sources)

    conversations = faults.each(undecoded(table, columns["images"]), read)
    faults.settle(table, drop=None)
    return list(conversations.values())
