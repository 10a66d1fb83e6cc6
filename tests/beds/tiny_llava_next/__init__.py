"""How the bundled tiny LLaVA-NeXT was made: model and tokenizer, batches, grounding losses, pre-training, measuring.

`python -m tests.beds.tiny_llava_next.pretrain --out DIR` trains it from a random start as `recipe.yaml` says, and
`python -m tests.beds.tiny_llava_next.measure --model DIR` says how well it reads.
"""
