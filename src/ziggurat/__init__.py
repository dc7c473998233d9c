"""Multi-scale low-rank fine-tuning for Hugging Face models. Importing it registers the methods with PEFT."""

from ziggurat.host.chatter import hush_bitsandbytes

hush_bitsandbytes()  # before anything that imports PEFT

from ziggurat.host.supported import check_versions

check_versions()  # before anything that stands on parts of PEFT and transformers which other versions may not have

from ziggurat._distribution import VERSION as __version__
from ziggurat.host.lifecycle import step
from ziggurat.host.like_lora import create_loraplus_optimizer, hotswap_adapter
from ziggurat.host.plain import PlainLora, plain_lora
from ziggurat.host.plugins import load_installed
from ziggurat.host.sets.tenants import add_tenants, save_tenants, share
from ziggurat.methods.adapterdrop import AdapterDropConfig, AdapterDropModel
from ziggurat.methods.aslora import ASLoRAConfig
from ziggurat.methods.dylora import DyLoRAConfig, DyLoRAModel
from ziggurat.methods.lor2c.config import LoR2CConfig
from ziggurat.methods.lor2c.model import LoR2CModel
from ziggurat.methods.lora2.config import LoRA2Config
from ziggurat.methods.lora2.model import LoRA2Model
from ziggurat.methods.loraxs import LoRAXSConfig
from ziggurat.methods.msplora.config import MSPLoraConfig
from ziggurat.methods.msplora.model import MSPLoraModel
from ziggurat.methods.sharelora import ShareLoRAConfig
from ziggurat.methods.tiedlora import TiedLoRAConfig

__all__ = [
    "ASLoRAConfig",
    "AdapterDropConfig",
    "AdapterDropModel",
    "DyLoRAConfig",
    "DyLoRAModel",
    "LoR2CConfig",
    "LoR2CModel",
    "LoRA2Config",
    "LoRA2Model",
    "LoRAXSConfig",
    "MSPLoraConfig",
    "MSPLoraModel",
    "PlainLora",
    "ShareLoRAConfig",
    "TiedLoRAConfig",
    "__version__",
    "add_tenants",
    "create_loraplus_optimizer",
    "hotswap_adapter",
    "plain_lora",
    "save_tenants",
    "share",
    "step",
]

load_installed()
