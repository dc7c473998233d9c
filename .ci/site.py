"""For mkdocs: a fence has its language alone (its other words are for tests/test_docs.py), and links that lead out of
docs/ lead into the repository, where ZIGGURAT_REPOSITORY says its address."""

import os
import re

REPOSITORY = os.environ.get("ZIGGURAT_REPOSITORY", "").rstrip("/")


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = re.sub(r"^( *```\w+) .*$", r"\1", markdown, flags=re.MULTILINE)
    return re.sub(r"\]\(\.\./", f"]({REPOSITORY}/blob/main/", markdown) if REPOSITORY else markdown
