"""For hatchling: the project's URLs, and the README with links that work on PyPI.

ZIGGURAT_REPOSITORY has the repository's address: the workflows in .github set it from the host that they run on.
Without it a build has the README as it is, and no URLs.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Links(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("ZIGGURAT_REPOSITORY", "").rstrip("/")
        if repository:
            here = f"v{metadata['version']}"
            readme = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/{here}/", readme)
            readme = re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/{here}/", readme)
            metadata["urls"] = {
                "Repository": repository,
                "Documentation": f"{repository}/tree/{here}/docs",
                "Changelog": f"{repository}/blob/{here}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
