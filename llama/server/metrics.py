"""Metrics in Prometheus' text format 0.0.4. Names, types and buckets are vLLM's, with the prefix `llama:`."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence

GAUGES = {
    "num_requests_running": "Requests that hold a slot of the KV cache.",
    "num_requests_waiting": "Requests that wait for a slot.",
    "kv_cache_usage_perc": "The part of the KV cache that running requests use; 1 is all of it.",
}
COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts.",
    "generation_tokens_total": "Tokens that were generated.",
    "prefix_cache_queries_total": "Tokens of prompts, for which the cache was searched.",
    "prefix_cache_hits_total": "Tokens of prompts that the cache held already.",
    "num_preemptions_total": "Always 0: a request that has a slot keeps it.",
    "request_success_total": "Requests that have ended, by reason.",
}
FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
HISTOGRAMS: dict[str, tuple[Sequence[float], str]] = {
    "request_prompt_tokens": (TOKENS, "Tokens of a request's prompt."),
    "request_generation_tokens": (TOKENS, "Tokens that were generated for a request."),
    "iteration_tokens_total": (
        (1, *(2**e for e in range(3, 15))),
        "Tokens of a step: those generated, and the prompts that it has completed.",
    ),
    "request_params_n": ((1, 2, 5, 10, 20), "The field n of HTTP requests."),
    "request_params_max_tokens": (TOKENS, "The most tokens that a request may generate."),
    "time_to_first_token_seconds": (FIRST, "From the arrival of a request to its first token."),
    "inter_token_latency_seconds": (BETWEEN, "Between one token of a request and the next."),
    "e2e_request_latency_seconds": (WHOLE, "From the arrival of a request to its end."),
    "request_queue_time_seconds": (WHOLE, "From the arrival of a request to its slot."),
    "request_prefill_time_seconds": (WHOLE, "From a request's slot to its first token."),
    "request_decode_time_seconds": (WHOLE, "From the first token of a request to its last."),
}


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str, labels: str) -> list[str]:
        total, lines = 0, list[str]()
        for bound, count in zip([*map(float, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self.sum}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """The metrics of a server. Only the event loop's thread uses them."""

    def __init__(self, model_name: str) -> None:
        self.labels = label("model_name", model_name)
        self.counters: dict[str, Counter[str]] = {name: Counter({"": 0}) for name in COUNTERS}
        self.counters["request_success_total"].clear()  # it has no value without a reason
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}

    def add(self, name: str, value: int = 1, **labels: str) -> None:
        self.counters[name]["".join("," + label(*pair) for pair in labels.items())] += value

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self.histograms[name].add(value, times)

    def render(self, gauges: Mapping[str, float]) -> str:
        lines = list[str]()
        for name, what in GAUGES.items():
            lines += self._family(name, "gauge", what, {"": gauges.get(name, 0)})
        for name, what in COUNTERS.items():
            lines += self._family(name, "counter", what, self.counters[name])
        for name, (_, what) in HISTOGRAMS.items():
            lines += self._family(name, "histogram", what, {})
            lines += self.histograms[name].lines(f"llama:{name}", self.labels)
        return "\n".join(lines) + "\n"

    def _family(self, name: str, kind: str, what: str, values: Mapping[str, float]) -> list[str]:
        lines = [f"# HELP llama:{name} {what}", f"# TYPE llama:{name} {kind}"]
        return lines + [f"llama:{name}{{{self.labels}{labels}}} {value}" for labels, value in values.items()]


def label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{name}="{escaped}"'
