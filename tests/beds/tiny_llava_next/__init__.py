"""How the bundled tiny LLaVA-NeXT was made: what it starts from, batches, grounding losses, training, measuring.

`python -m tests.beds.tiny_llava_next.pretrain --out DIR` trains it as `recipe.yaml` says, from layers of the model
before, and `python -m tests.beds.tiny_llava_next.measure --model DIR` says how well it reads.
"""
