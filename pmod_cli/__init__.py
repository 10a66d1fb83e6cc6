"""pmod: turn a stock LLaVA into a p-MoD model, train it, evaluate it, profile it and look at what it keeps."""

__version__ = "0.2.0"
