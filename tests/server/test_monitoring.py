"""Monitoring of the server: its log and metrics."""

import json
import logging
import re

import pytest
from serving import CHAT, DIALOG, GREEDY, command, gauge, httpx, openai, serving, wait_for, wait_until_ready

from llama.server.log import JsonLines
from llama.server.metrics import HISTOGRAMS, Metrics

# The log


def test_prompts_are_logged_only_on_request(llama, caplog):
    caplog.set_level(logging.INFO, "llama.server")
    with serving(llama) as client:
        client.chat.completions.create(**CHAT)
        client.completions.create(model="small-chat", prompt="A secret", max_tokens=3)
        client.embeddings.create(model="small-chat", input="A secret")
        httpx.get(f"{client.url}/v1/a%0ab", headers={"X-Request-Id": "mine-1"})
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if hasattr(record, "fields")]
    lines = [line for line in lines if "/v1/" in line["path"]]
    assert "opposite" not in str(lines) + caplog.text
    assert "secret" not in str(lines) + caplog.text
    assert [line["path"] for line in lines] == ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/a\nb"]
    assert {"time", "level", "method", "path", "status", "seconds", "prompt_tokens", "cached_tokens"} <= {*lines[0]}
    assert {"completion_tokens", "first_token_seconds", "request_id"} <= {*lines[0]}
    assert 0 <= lines[0]["first_token_seconds"] <= lines[0]["seconds"]
    assert (lines[1]["completion_tokens"], lines[2]["first_token_seconds"]) == (3, None)
    assert (lines[3]["status"], lines[3]["request_id"]) == (404, "mine-1")
    assert "\nb" not in caplog.text
    caplog.clear()
    with serving(llama, log_prompts=True) as client:
        client.chat.completions.create(**CHAT)
        client.completions.create(model="small-chat", prompt="A secret", max_tokens=3)
    found = [record.fields["prompt"] for record in caplog.records if "prompt" in getattr(record, "fields", {})]
    assert found == [DIALOG, "A secret"]


def test_requests_of_clients_that_leave_are_logged_with_their_tokens(llama, slow, caplog):
    """Regression: the line had neither numbers of tokens nor the time to the first."""
    caplog.set_level(logging.INFO, "llama.server")
    with serving(llama) as client:
        stream = client.completions.create(**GREEDY, stream=True)
        next(stream)
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(**GREEDY)
        wait_for(lambda: gauge(client, "num_requests_running") == 0)
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    lines = [line for line in lines if line["path"] == "/v1/completions"]
    assert [line["status"] for line in lines] == [200, 499]
    for line in lines:
        assert (line["prompt_tokens"], 0 < line["completion_tokens"] < 200) == (2, True)
        assert 0 < line["first_token_seconds"] <= line["seconds"]


def test_requests_have_ids(llama):
    with serving(llama, keys=("key",)) as client:
        url, key = f"{client.url}/v1/models", {"Authorization": "Bearer key"}
        assert httpx.get(url, headers={**key, "X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
        assert httpx.get(url, headers={"X-Request-Id": "a-2"}).headers["x-request-id"] == "a-2"  # 401
        made = [
            httpx.get(url, headers={**key, "X-Request-Id": odd}).headers["x-request-id"] for odd in ("a b", "x" * 200)
        ]
        assert all(re.fullmatch("[0-9a-f]{32}", id) for id in made)
        assert made[0] != made[1]


def test_json_lines_of_other_records():
    record = logging.LogRecord("llama", logging.WARNING, "", 0, 'a "%s"', ("b\n",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"]) == ("WARNING", 'a "b\n"')


def test_a_full_log_disk_does_not_stop_the_server(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full, command("--log_json", stderr=full) as [process]:
        wait_until_ready(process)
        for _ in range(100):
            assert httpx.get(f"{process.url}/v1/models").status_code == 200
        process.terminate()
        assert process.wait(20) == 0


# Metrics


PROMPT = "The opposite of hot is"


def test_metrics(llama):
    with serving(llama) as client:
        usage = client.completions.create(model="small-chat", prompt=PROMPT, max_tokens=4, n=2, echo=True).usage
        assert gauge(client, "generation_tokens_total") == usage.completion_tokens
        assert gauge(client, "prompt_tokens_total") == 2 * usage.prompt_tokens  # as each choice is a request
        assert gauge(client, "time_to_first_token_seconds_count") == 2
        assert gauge(client, "inter_token_latency_seconds_count") == usage.completion_tokens - 2
        reply = httpx.get(f"{client.url}/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'llama:e2e_request_latency_seconds_bucket{model_name="small-chat",le="+Inf"} 2' in reply.text


def test_prometheus_reads_the_metrics(llama):
    parser = pytest.importorskip("prometheus_client.parser")
    odd = 'a "b"\\\n'
    with serving(llama) as client:
        client.completions.create(model="small-chat", prompt="Once", max_tokens=4, n=2, extra_body={"min_tokens": 4})
        client.chat.completions.create(**CHAT)
        text = httpx.get(f"{client.url}/metrics").text
    metrics = Metrics(odd)
    metrics.add("request_success_total", finished_reason=odd)
    for found in (text, metrics.render({})):
        families = {family.name: family for family in parser.text_string_to_metric_families(found)}
        for family in families.values():
            assert family.documentation
            for sample in family.samples:
                assert sample.labels["model_name"] in ("small-chat", odd)
            if family.type == "histogram":
                counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
                assert counts == sorted(counts)
                assert counts[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))
        kinds = {name.removeprefix("llama:"): family.type for name, family in families.items()}
        assert {name for name, kind in kinds.items() if kind == "histogram"} == {*HISTOGRAMS}
        gauges = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
        assert {name for name, kind in kinds.items() if kind == "gauge"} == gauges
        counters = {"prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"}
        counters |= {"num_preemptions", "request_success"}
        assert {name for name, kind in kinds.items() if kind == "counter"} == counters


def test_metrics_add_up(llama):
    with serving(llama) as client:
        body = {"prompt": "Once", "n": 3, "max_tokens": 4, "extra_body": {"min_tokens": 4}}
        prompt = client.completions.create(model="small-chat", **body).usage.prompt_tokens
        assert gauge(client, "request_params_n_sum") == 3
        assert gauge(client, "request_params_max_tokens_sum") == 12
        assert gauge(client, "request_prompt_tokens_sum") == gauge(client, "prompt_tokens_total") == 3 * prompt
        assert gauge(client, "request_generation_tokens_sum") == gauge(client, "generation_tokens_total") == 12
        assert gauge(client, "iteration_tokens_total_sum") == 3 * prompt + 12
        parts = ("queue", "prefill", "decode")
        names = [f"request_{part}_time_seconds" for part in parts]
        assert [gauge(client, f"{name}_count") for name in names] == [3, 3, 3]
        spent = sum(gauge(client, f"{name}_sum") for name in names)
        assert 0 < spent <= gauge(client, "e2e_request_latency_seconds_sum") + 1e-6
        assert gauge(client, "time_to_first_token_seconds_sum") <= spent
        assert gauge(client, "kv_cache_usage_perc") == 0


def test_kv_cache_usage(llama, slow):
    with serving(llama) as client:
        stream = client.completions.create(**GREEDY, stream=True)
        next(stream)
        used = gauge(client, "kv_cache_usage_perc")
        assert 0 < used < 0.25  # one of four slots
        wait_for(lambda: gauge(client, "kv_cache_usage_perc") > used)
        stream.close()
