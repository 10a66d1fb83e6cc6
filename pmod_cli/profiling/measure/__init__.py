"""What a model costs when it runs: the clock, peaks of devices, models that share weights, phases, latency."""
