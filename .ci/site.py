"""For mkdocs: a fence has its language alone. Its other words (`no-run`, a file's name) are for tests/test_docs.py."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"^( *```\w+) .*$", r"\1", markdown, flags=re.MULTILINE)
