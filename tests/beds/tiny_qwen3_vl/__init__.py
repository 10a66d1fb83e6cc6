"""How the bundled tiny Qwen3-VL was made: processor, what it starts from, batches, training, measuring.

What the bundled tiny LLaVA-NeXT was made of is used as it is: grounding losses, Muon, masters, checkpoints of the run.
`python -m tests.beds.tiny_qwen3_vl.pretrain --out DIR` trains it as `recipe.yaml` says, and
`python -m tests.beds.tiny_qwen3_vl.measure --model DIR` says how well it reads.
"""
