"""Scores of a p-MoD or stock LLaVA through lmms-eval: the adapter, the suite of benchmarks, the runner, the report.

Importing this package imports neither torch nor lmms-eval; `runner` and `adapter` do.
"""
