"""What the server counts, in Prometheus' text format 0.0.4. Names and types are vLLM's, with the prefix `llama:`."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
GAUGES = {
    "num_requests_running": "Requests that hold a slot of the KV cache.",
    "num_requests_waiting": "Requests that wait for a slot.",
}
COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts.",
    "generation_tokens_total": "Tokens that were generated.",
    "prefix_cache_queries_total": "Tokens of prompts, for which the cache was searched.",
    "prefix_cache_hits_total": "Tokens of prompts that the cache held already.",
    "request_success_total": "Requests that have ended, by reason.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From the arrival of a request to its first token.",
    "inter_token_latency_seconds": "Between one token of a request and the next.",
    "e2e_request_latency_seconds": "From the arrival of a request to its end.",
}


class Histogram:
    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str, labels: str) -> list[str]:
        total, lines = 0, list[str]()
        for bound, count in zip([*self.bounds, "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self.sum}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """All of one server. The event loop's thread alone writes and reads them."""

    def __init__(self, model_name: str) -> None:
        escaped = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self.labels = f'model_name="{escaped}"'
        plain = [name for name in COUNTERS if name != "request_success_total"]
        self.counters: dict[str, Counter[str]] = {name: Counter({"": 0} if name in plain else {}) for name in COUNTERS}
        self.histograms = {name: Histogram() for name in HISTOGRAMS}

    def add(self, name: str, value: int = 1, labels: str = "") -> None:
        self.counters[name][labels] += value

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self.histograms[name].add(value, times)

    def render(self, gauges: Mapping[str, float]) -> str:
        lines = list[str]()
        for name, what in GAUGES.items():
            lines += self._family(name, "gauge", what, {"": gauges.get(name, 0)})
        for name, what in COUNTERS.items():
            lines += self._family(name, "counter", what, self.counters[name])
        for name, what in HISTOGRAMS.items():
            lines += self._family(name, "histogram", what, {})
            lines += self.histograms[name].lines(f"llama:{name}", self.labels)
        return "\n".join(lines) + "\n"

    def _family(self, name: str, kind: str, what: str, values: Mapping[str, float]) -> list[str]:
        lines = [f"# HELP llama:{name} {what}", f"# TYPE llama:{name} {kind}"]
        return lines + [f"llama:{name}{{{self.labels}{labels}}} {value}" for labels, value in values.items()]
