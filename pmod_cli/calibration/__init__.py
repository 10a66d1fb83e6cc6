"""What each layer needs, measured without training: where a model reads, and the p-MoD settings that cost it least.

`samples` and `asked` make batches of pictures and questions, `replay` runs a decoder layer by layer so that what lies
below a layer is computed once, and `depth` measures what each layer is for.
"""
