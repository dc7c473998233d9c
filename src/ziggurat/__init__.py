"""Multi-scale low-rank fine-tuning for Hugging Face models. Importing it registers the methods with PEFT."""

__version__ = "0.1.0"
