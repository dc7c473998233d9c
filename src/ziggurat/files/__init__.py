"""Files of strangers read with care, own files written whole or not at all. Knows no PEFT."""
