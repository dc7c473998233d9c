"""An adapter in other forms: plain LoRA (`plain`), as servers take it (`serving`), merged into its model (`merged`)."""

from ziggurat.host.plain import lora_pairs

from .merged import merge, merge_model
from .plain import Exported, export, export_model
from .serving import SERVING_RANKS

__all__ = ["SERVING_RANKS", "Exported", "export", "export_model", "lora_pairs", "merge", "merge_model"]
