"""Conversations in any of the usual forms, converted to the messages of chat templates."""

import json
from collections.abc import Iterator
from typing import Any

from ziggurat.recipe.schema import DataPart

from .faults import RowFault, kind_of

#: Role of chat templates -> its names in files of other tools; `data.roles.*` adds to them.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
    "call": ("function_call", "tool_call"),
}
#: Key of a message in chat templates -> its names in files; `data.columns.role` and `.content` name others.
_KEYS = {"role": ("role", "from"), "content": ("content", "value")}
#: Further keys of a message that chat templates know.
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")
#: Marks an image in a text: Unicode's object replacement character.
IMAGE = "\ufffc"
#: Kinds of a message's parts that are images, and their keys for the source.
_IMAGES, _SOURCES = ("image", "image_url"), ("image", "path", "url", "image_url")
#: Keys of thoughts, which some chat templates put into an answer and others leave out.
THOUGHTS = ("reasoning_content", "thinking")

Message = dict[str, Any]


def conversation(value: Any, data: DataPart, images: list[Any] | None = None) -> tuple[list[Message], set[str]]:
    """The messages of a conversation (a list, or JSON text of one), and the keys of messages that aren't read.

    `images` receives the source of each image among their parts (None if the part has none), and the text has the mark
    `IMAGE` in its place; without the list images are refused. ShareGPT's `from` and `value` become `role` and
    `content`, its calls of functions `tool_calls`. Raises RowFault for a message without role or content, an unknown
    role, parts that are no text, or calls that can't be read.
    """
    value = parsed(value)
    if not value:
        raise RowFault("no conversation", gap=True)
    if not isinstance(value, list):
        raise RowFault(f"a conversation is a list of messages, this is {kind_of(value)}")
    names = {name: role for role in ROLES for name in (*ROLES[role], *(getattr(data.roles, role) or ()))}
    unread: set[str] = set()
    messages = []
    for raw in value:
        if not isinstance(raw, dict):
            raise RowFault(f"each message needs role and content, got {raw!r}")
        messages.append(
            _message({key: part for key, part in raw.items() if part is not None}, data, names, unread, images)
        )
    return messages, unread


def _message(
    raw: Message, data: DataPart, names: dict[str, str], unread: set[str], images: list[Any] | None
) -> Message:
    keys = {"role": data.columns.role, "content": data.columns.content}
    role_key, content_key = (
        chosen or next((key for key in _KEYS[name] if key in raw), _KEYS[name][0]) for name, chosen in keys.items()
    )
    role_name = raw.get(role_key)
    if role_name is None:
        raise RowFault(f"each message needs role and content, got {raw!r}")
    role = names.get(str(role_name).strip()) or names.get(str(role_name).strip().lower())
    if role is None:
        raise RowFault(
            f"a message has the role '{role_name}'; known are {', '.join(names)}: name it in data.roles.user, "
            "data.roles.assistant, ..."
        )
    calls = _calls(raw.get("tool_calls") or raw.get("function_call"))
    content = raw.get(content_key)
    if role == "call":
        calls, content, role = _calls(content), "", "assistant"
        if not calls:
            raise RowFault(f"a message with the role '{role_name}' holds no call: {raw!r}")
    if content is None and not calls:
        raise RowFault(f"each message needs role and content, got {raw!r}")
    message: Message = {"role": role, "content": text_of(content, images)}
    if calls:
        message["tool_calls"] = calls
    message |= {key: raw[key] for key in _KEPT if raw.get(key)}
    read = {role_key, content_key, *_KEPT, "tool_calls", "function_call"}
    unread |= {key for key, part in raw.items() if key not in read and part not in ("", [], {})}
    return message


def text_of(content: Any, images: list[Any] | None = None) -> str:
    """The text of a message, which may come in parts; see `conversation`. Raises RowFault for unreadable parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return "".join(_text_of_part(part, content, images) for part in parts)


def _text_of_part(part: Any, content: Any, images: list[Any] | None) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind in _IMAGES and images is not None:
        source = next((part[key] for key in _SOURCES if part.get(key) is not None), None)
        images.append(source.get("url", source) if isinstance(source, dict) else source)
        return IMAGE
    if kind != "text" or text is None:
        raise RowFault(f"a message holds parts that are no texts, and only texts are learned: {content!r}")
    return str(as_text(text))


def as_text(value: Any) -> str | None:
    """A cell as a text; numbers and dates are converted. Raises RowFault for a list, say."""
    if isinstance(value, bytes | list | dict):
        raise RowFault(f"a text is needed, this is {kind_of(value)}: {str(value)[:80]}")
    return None if value is None else str(value)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Messages after a system prompt, unless they have one already."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def has_images(value: Any) -> bool:
    """True for a conversation with a part that is an image."""
    value = parsed(value)
    messages = [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []
    parts = [part for message in messages for cell in message.values() if isinstance(cell, list) for part in cell]
    return any(isinstance(part, dict) and part.get("type") in _IMAGES for part in parts)


def _calls(value: Any) -> list[Message]:
    """Function calls in the form of chat templates: `arguments` is an object, even if it was JSON text."""
    calls = []
    for call, function in _functions(value):
        if function is None:
            raise RowFault(f"a call of a tool needs a function's name and arguments, got {call!r}")
        arguments = parsed(function.get("arguments", {}))
        call_id = {"id": call["id"]} if "id" in call else {}
        calls.append({"type": "function", **call_id, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def tools_of(value: Any) -> list[Message]:
    """Descriptions of tools in the form of chat templates. Raises RowFault for other objects."""
    tools = []
    for tool, function in _functions(value):
        if function is None:
            raise RowFault(f"a tool needs a name and its parameters, as a JSON schema; got {str(tool)[:80]}")
        tools.append({"type": "function", "function": function})
    return tools


def _functions(value: Any) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Each call or tool of a list (or the only one), and its function; None if it has no named function."""
    value = parsed(value)
    for entry in (value if isinstance(value, list) else [value]) if value else []:
        entry = without_gaps(entry)
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        yield entry, function if named else None


def parsed(value: Any) -> Any:
    """The value of a JSON text of a list or an object; other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_gaps(value: Any) -> Any:
    """A nested value without the keys that are None: a table gives every object the keys of all objects."""
    if isinstance(value, dict):
        return {key: without_gaps(part) for key, part in value.items() if part is not None}
    return [without_gaps(part) for part in value] if isinstance(value, list) else value


def as_messages(value: Any) -> list[Any] | None:
    """The list of messages in a prompt or a completion, given as a list or as JSON text; None for a plain text."""
    value = parsed(value) if isinstance(value, str) else value
    is_chat = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    return value if is_chat else None
