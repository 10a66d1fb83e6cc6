"""What a model costs before it runs: FLOPs and KV cache, stock beside p-MoD, without weights.

workload -> subject -> operators -> cost -> kv_cache -> report -> tables. `closed` and `published` are for comparison.
"""

from pmod_cli.profiling.report import CONVENTIONS, Profile, profile, to_json
from pmod_cli.profiling.subject import Subject, load_subject
from pmod_cli.profiling.workload import Workload

__all__ = ["CONVENTIONS", "Profile", "Subject", "Workload", "load_subject", "profile", "to_json"]
