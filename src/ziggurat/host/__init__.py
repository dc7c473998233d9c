"""The seam to PEFT and transformers, and everything that follows from a method's two functions.

A method is written in `site`, `tensors`, `method` and `config`; `tuner`, `method_layer`, `linear` and `bank` put it
into a model, compute and merge. Rooms: `base` looks at the base model, `experts` and `paths` adapt places that are not
linear layers, `saved` reads and writes folders, `sets` handles adapters that share tensors.
"""
