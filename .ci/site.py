"""For mkdocs: what of the repository belongs to the site, though it lies outside of docs/.

The notebooks of examples/ are pages, with their outputs, and pictures that a page shows come along. Other links out of
docs/ lead into the repository, where ZIGGURAT_REPOSITORY says its address. A fence has its language alone: its other
words are for tests/test_docs.py.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
REPOSITORY = os.environ.get("ZIGGURAT_REPOSITORY", "").rstrip("/")
PICTURE, NOTEBOOK = r"\]\(\.\./([^)]*\.(?:png|svg))\)", r"\]\(\.\./(examples/[^)]*)\.ipynb\)"


def on_files(files: Files, config: object, **_: object) -> Files:
    pages = [Path(str(file.abs_src_path)).read_text(encoding="utf-8") for file in files.documentation_pages()]
    for picture in {name for page in pages for name in re.findall(PICTURE, page)}:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        body, resources = MarkdownExporter().from_filename(str(notebook), {"unique_key": notebook.stem})
        files.append(File.generated(config, f"examples/{notebook.stem}.md", content=body))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = re.sub(r"^( *```\w+) .*$", r"\1", markdown, flags=re.MULTILINE)
    markdown = re.sub(NOTEBOOK, r"](\1.md)", re.sub(PICTURE, r"](\1)", markdown))
    return re.sub(r"\]\(\.\./", f"]({REPOSITORY}/blob/main/", markdown) if REPOSITORY else markdown
