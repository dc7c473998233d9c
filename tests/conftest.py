"""Settings of all tests. Lying here, it also puts this folder on the import path: `from zoo import ZOO`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
