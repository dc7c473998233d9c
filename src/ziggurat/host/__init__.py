"""The seam to PEFT and transformers, and what follows from a method's two functions.

`site`, `tensors`, `method`, `config`: what a method is written in. `tuner`, `method_layer`, `linear`, `bank`: putting it into a model, forward,
merging. Rooms: `base` looks at the base model, `experts` and `paths` are the places that are no linear layers,
`saved` reads and writes folders, `sets` has adapters with tensors in common.
"""
