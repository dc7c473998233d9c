"""Multi-scale low-rank fine-tuning for Hugging Face models. Importing it registers the methods with PEFT."""

from ziggurat.host.registry import register
from ziggurat.methods.msplora.config import MSPLoraConfig
from ziggurat.methods.msplora.model import MSPLoraModel

__version__ = "0.1.0"
__all__ = ["MSPLoraConfig", "MSPLoraModel", "__version__"]

register(MSPLoraConfig, MSPLoraModel)
