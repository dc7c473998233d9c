"""Settings of all tests. Lying here, it also puts this folder on the import path: `from zoo import ZOO`."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A deadline fails on a busy machine whatever the code does.
settings.register_profile("ziggurat", deadline=None)
settings.load_profile("ziggurat")
