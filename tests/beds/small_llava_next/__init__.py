"""How `small-llava-next` is made: a real pretrained decoder, SmolLM2-135M-Instruct, that was taught to read documents.

`python -m tests.beds.small_llava_next.build --out DIR` writes it from the language model's package and the delta that
lies here; `python -m tests.beds.small_llava_next.pretrain --out DIR` makes that delta, as `recipe.yaml` says.
"""
