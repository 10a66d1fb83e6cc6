"""What the server counts, for Prometheus."""

from __future__ import annotations

from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def of(kind: type[Metric], name: str, about: str, **more: Any) -> Metric:
            return kind(f"pmod_{name}", about, registry=self._registry, **more)

        self.requests = of(
            Counter, "requests", "Requests to /v1/chat/completions by HTTP status.", labelnames=["status"]
        )
        self.disconnects = of(Counter, "disconnects", "Clients that left before their answer ended.")
        self.waiting = of(Gauge, "requests_waiting", "Requests that are taken and not yet in the batch.")
        self.running = of(Gauge, "requests_running", "Rows of the batch.")
        self.kv_bytes = of(Gauge, "kv_cache_bytes", "Keys and values of the batch.")
        self.prompt_tokens = of(Counter, "prompt_tokens", "Tokens of prompts, vision tokens included.")
        self.new_tokens = of(Counter, "generation_tokens", "Tokens of answers.")
        self.prefill_rows = of(Histogram, "prefill_rows", "Prompts that are prefilled together.", buckets=ROWS)
        self.step_rows = of(Histogram, "decode_rows", "Rows that get a token together.", buckets=ROWS)
        self.first_token = of(
            Histogram, "time_to_first_token_seconds", "From the request to its first token.", buckets=SECONDS
        )
        self.duration = of(Histogram, "request_seconds", "From the request to the end of its answer.", buckets=SECONDS)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
