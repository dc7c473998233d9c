"""The seam to PEFT and transformers, and what follows from a method's two functions.

`site`, `tensors`, `method` and `config` are what a method is written in; `tuner`, `method_layer`, `linear` and `bank`
put it into a model, compute and merge. Rooms: `base` looks at the base model, `experts` and `paths` are places that are
no linear layers, `saved` reads and writes folders, `sets` has adapters with tensors in common.
"""
