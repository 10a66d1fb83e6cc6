"""What a model costs before it runs: sizes, rows of a batch, formulas, the fvcore trace, KV cache and memory.

`trace` and `operators` import torch and transformers; the formulas need neither.
"""
