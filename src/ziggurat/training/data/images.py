"""Images of conversations: their places in the messages, and their files or bytes."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname

from ziggurat.extras import require

from .chat import IMAGE, Message, parsed
from .faults import RowFault, kind_of

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

#: Stands for an image in texts of other tools (LLaVA, LLaMA-Factory, TRL).
MARK = "<image>"

#: An image's source: `bytes` if they are given, else the file at `path`.
Source = dict[str, Any]


class Images:
    """Reads the images of one table's rows; a fault names the first file that has it."""

    def __init__(self, source: str, folder: str | None) -> None:
        require(f"reading the images of {source}", "pillow")
        place = Path(source).expanduser()
        beside = place.parent if place.is_file() else Path()
        self.folder = Path(folder).expanduser() if folder is not None else beside
        self._first: dict[str, str] = {}

    def placed(self, messages: list[Message], named: list[Any], column: Any) -> tuple[list[Message], list[Source]]:
        """The messages with the mark `IMAGE` for each image, and the images' sources in the same order.

        `named`: the sources in the messages' parts, None for parts without one; `column`: the row's images outside the
        messages. Images without a part or a mark `<image>` are placed before the first question. Raises RowFault for
        images without a place, places without an image, images that can't be read, and images in answers.
        """
        column = parsed(column)
        images = column if isinstance(column, list) else [] if column in (None, "") else [column]
        if images and not named:
            messages, named = _with_signs(messages, len(images)), [None] * len(images)
        if len(images) != named.count(None):
            raise RowFault(f"{named.count(None)} places for images in the messages, and {len(images)} images")
        if any(IMAGE in message["content"] for message in messages if message["role"] == "assistant"):
            raise RowFault("an image in a message of the assistant, and only texts are learned")
        if sum(message["content"].count(IMAGE) for message in messages) != len(named):
            raise RowFault(f"a text holds the sign {IMAGE!a}, which stands for images: take it out")
        remaining = iter(images)
        return messages, [self._source(next(remaining) if source is None else source) for source in named]

    def _source(self, value: Any) -> Source:
        """An image's source, checked to be readable."""
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str):
            value = self._named(value)
        if not isinstance(value, bytes | Path):
            raise RowFault(f"an image is the path of a file, or its bytes; this is {kind_of(value)}")
        in_memory = isinstance(value, bytes)
        source = {"bytes": value if in_memory else None, "path": None if in_memory else str(value)}
        if isinstance(value, Path) and not value.is_file():
            raise self._fault("an image file is missing", value)
        try:
            open_image(source)
        except Exception as error:  # PIL's readers raise any kind of error for broken files
            raise self._fault(f"an image cannot be read ({type(error).__name__})", value) from error
        return source

    def _named(self, name: str) -> bytes | Path:
        if name.startswith(("http://", "https://")):
            raise RowFault("an image is given by a web address: download it, and name the file")
        if name.startswith("data:"):
            try:
                return base64.b64decode(name.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise RowFault("an image in base64 cannot be decoded", gap=True) from error
        if name.startswith("file://"):
            plain = name.removeprefix("file://")
            name = plain if Path(plain).is_file() else url2pathname(plain)
        return self.folder / Path(name).expanduser()

    def _fault(self, kind: str, value: bytes | Path) -> RowFault:
        named = "" if isinstance(value, bytes) else f", the first is {str(value)!r}"
        return RowFault(self._first.setdefault(kind, f"{kind}{named}"), gap=True)


def _with_signs(messages: list[Message], count: int) -> list[Message]:
    """Messages with signs for `count` images, in place of marks or before the first question."""
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    marks = sum(messages[place]["content"].count(MARK) for place in questions)
    if marks not in (0, count) or not questions:
        raise RowFault(f"{marks} places for images in the messages, and {count} images")
    placed = list(messages)
    for place in questions if marks else questions[:1]:
        text = messages[place]["content"]
        placed[place] = {**messages[place], "content": text.replace(MARK, IMAGE) if marks else IMAGE * count + text}
    return placed


def open_image(source: Source) -> Image:
    """The image in RGB, upright. Raises PIL's errors for other files."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(source["bytes"]) if source["bytes"] is not None else source["path"]) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def undecoded(table: Dataset, column: str | None) -> Dataset:
    """A table whose images stay bytes and paths; a hub data set may decode them."""
    import datasets

    if column is None:
        return table
    feature: Any = table.features[column]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    if isinstance(inner, datasets.Image):
        return table.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return table
