"""GET /metrics over a real trunk: what is counted is what clients got, under the names that dashboards know."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import in_process
import pytest
from in_process import Trunk, served
from on_a_loop import on_a_loop
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain

from moe_ray.api.job import Choice, GenerationJob
from moe_ray.api.job_watch import JobWatch
from moe_ray.api.metrics_route import KEEP_S, KeptLoad
from moe_ray.api.output import JobOutput
from moe_ray.api.service import HttpOptions
from moe_ray.core import Request, SamplingParams, TokenEvent
from moe_ray.deploy.load_overview import overview
from moe_ray.experts.server.load_counters import KeyLoad, LoadSample, between
from moe_ray.observe.exposition import ModelTold, expose
from moe_ray.observe.families import MOST_LAYER_SERIES
from moe_ray.observe.request_counts import RequestCounts
from moe_ray.text.tokenizer import Tokenizer

ASK: dict[str, Any] = {"prompt": list(range(5, 45)), "max_tokens": 6, "temperature": 0, "ignore_eos": True}
LONG = {**ASK, "stream": True, "max_tokens": 300}
TGI_STAGES = ("concat", "forward", "decode", "filter")
OPEN_METRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


class Series:
    """The samples of a scrape."""

    def __init__(self, families: list[Metric]) -> None:
        self.types = {family.name: family.type for family in families}
        self._samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels; there must be one."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no {name} {labels}"
        return sum(found)


async def scrape(client: httpx.AsyncClient) -> Series:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return Series(list(plain(response.text)))


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={**ASK, **body})


@on_a_loop
async def test_what_is_counted_is_what_clients_got(trunk: Trunk, readable_model: Path) -> None:
    async with served(readable_model, [trunk.info]) as client:
        before = await scrape(client)
        assert before("vllm:request_success_total", finished_reason="stop") == 0, "also what has not happened is there"
        whole = (await ask(client, n=2)).json()
        streamed = await ask(client, stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n")
        text = whole["choices"][0]["text"]
        stopped = (await ask(client, stop=[text[-3:]])).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert (await ask(client, temperature=-1)).status_code == 400
        assert (await client.post("/v1/completions", content=b"{")).status_code == 400
        assert (await client.get("/v1/nothing")).status_code == 404
        after = await all_told(client, trunk)

    produced = 3 * 6 + stopped["usage"]["completion_tokens"]
    assert after("vllm:prompt_tokens_total", model_name="random") == 4 * 40
    assert after("vllm:generation_tokens_total") == produced
    assert after("vllm:request_success_total", finished_reason="length") == 3
    assert after("vllm:request_success_total", finished_reason="stop") == 1
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "e2e_request_latency"):
        assert after(f"vllm:{name}_seconds_count") == 4
        assert 0 < after(f"vllm:{name}_seconds_sum") < 60
    steps = after("vllm:inter_token_latency_seconds_count")
    assert steps == produced - 4
    assert after("vllm:request_prompt_tokens_sum") == 160
    assert after("vllm:request_generation_tokens_bucket", le="5.0") == (stopped["usage"]["completion_tokens"] <= 5)
    assert after("vllm:request_params_n_bucket", le="1.0") == 2
    assert after("vllm:request_max_num_generation_tokens_sum") == 2 * 6 + stopped["usage"]["completion_tokens"]

    assert after("tgi_request_count") == 5
    assert after("tgi_request_success") == 3
    assert after("tgi_request_failure", err="validation") == 2
    assert after("tgi_request_duration_count") == 3
    assert after("tgi_request_input_length_sum") == 160
    parts = [after(f"tgi_request_{part}_duration_sum") for part in ("validation", "queue", "inference")]
    assert sum(parts) == pytest.approx(after("tgi_request_duration_sum"), rel=1e-6)
    assert after.types["tgi_request_count"] in ("unknown", "untyped")

    hits = after("vllm:prefix_cache_hits_total", engine="trunk-1") - before("vllm:prefix_cache_hits_total")
    queries = after("vllm:prefix_cache_queries_total") - before("vllm:prefix_cache_queries_total")
    assert queries >= 160
    assert hits == after("vllm:prompt_tokens_cached_total") > 0
    assert after("vllm:num_requests_running") == after("vllm:num_requests_waiting") == 0
    assert after("vllm:kv_cache_usage_perc") == 0
    assert after("moe_ray_trunk_generated_tokens_total", trunk="trunk-1") >= produced
    assert after("tgi_batch_inference_count", method="prefill") >= 1
    assert after("tgi_batch_inference_count", method="decode") >= 10
    stages = sum(
        after(f"tgi_batch_{s}_duration_sum", method="decode") for s in ("concat", "forward", "decode", "filter")
    )
    assert stages == pytest.approx(after("tgi_batch_inference_duration_sum", method="decode"), rel=1e-6)
    assert after("vllm:iteration_tokens_total_sum") >= produced
    assert after("moe_ray_gateway_http_responses_total", status="200") >= 4
    assert after("moe_ray_gateway_http_responses_total", status="400") == 2
    assert after("moe_ray_gateway_http_requests_in_flight") == 1, "this scrape"


async def all_told(client: httpx.AsyncClient, trunk: Trunk) -> Series:
    """A scrape after the trunk has told of its last step; it tells its counters each second."""
    end = time.monotonic() + 10
    while (found := await scrape(client))("moe_ray_trunk_steps_total") < trunk.runtime.stats().steps:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    return found


@on_a_loop
async def test_prometheus_needs_no_key_and_sees_no_text(trunk: Trunk, readable_model: Path) -> None:
    async with served(readable_model, [trunk.info], HttpOptions(api_keys=("secret-key",))) as client:
        key = {"Authorization": "Bearer secret-key"}
        told = await client.post("/v1/completions", json={**ASK, "stop": ["needle"]}, headers=key)
        response = await client.get("/metrics")
        assert told.status_code == response.status_code == 200
        assert not any(word in response.text for word in ("needle", "secret-key", told.json()["choices"][0]["text"]))

        response = await client.get("/metrics", headers={"Accept": OPEN_METRICS})
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        found = Series(list(open_metrics(response.text)))
        assert found.types["vllm:generation_tokens"] == "counter"
        assert found.types["vllm:time_to_first_token_seconds"] == "histogram"
        assert found("tgi_request_count") == 1
        assert (await client.head("/metrics")).status_code == 200


@on_a_loop
async def test_a_client_that_goes_away_is_counted(trunk: Trunk, readable_model: Path) -> None:
    trunk.engine.pause_s = 0.02
    async with served(readable_model, [trunk.info]) as client:
        async with client.stream(
            "POST", "/v1/completions", json={**ASK, "stream": True, "max_tokens": 300}
        ) as response:
            async for _ in response.aiter_lines():
                break
        end = time.monotonic() + 10
        while (found := await scrape(client))("vllm:request_success_total", finished_reason="abort") == 0:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
    trunk.engine.pause_s = 0.0
    assert found("tgi_request_failure", err="dropped") == 1
    assert found("tgi_request_success") == 0


@on_a_loop
async def test_without_a_trunk_there_are_metrics(readable_model: Path) -> None:
    async with served(readable_model, []) as client:
        found = await scrape(client)
    assert found("tgi_queue_size") == found("vllm:generation_tokens_total") == 0


def expert_answer(layers: int, expert: int) -> dict[str, Any]:
    """What a replica answers to `load`, by the code that makes it."""
    keys = {(layer, expert): KeyLoad(2, 10 * (layer + 1), 0.5, 0.1) for layer in range(layers)}
    none = dict.fromkeys(keys, KeyLoad())
    window = between(LoadSample.of(0, none), LoadSample.of(10, keys))
    load = {name: getattr(window, name) for name in ("seconds", "busy", "rows_per_call", "queue_ms", "rows_per_layer")}
    place = {"replica_id": f"r{expert}", "node_id": "n", "pid": 1, "queued_rows": 3, "weight_bytes": 1}
    return {**place, "load": load}


def test_experts_are_there_and_their_layers_where_they_are_few() -> None:
    for layers, shown in ((4, True), (MOST_LAYER_SERIES, False)):
        answers = {f"Expert{expert}": [expert_answer(layers, expert)] for expert in range(2)}
        text, _ = expose("", [ModelTold("m", RequestCounts(), [])], overview(answers))
        found = Series(list(plain(text.decode())))
        assert found("moe_ray_expert_busy_fraction", expert="1", deployment="Expert1", replica="r1") == pytest.approx(
            min(0.05 * layers, 1)
        )
        assert found("moe_ray_expert_queued_rows", expert="0") == 3
        assert (b"moe_ray_expert_layer_rows{" in text) == shown
    answers = {"Expert0": [expert_answer(3, 0)], "Expert1": []}
    text, _ = expose("", [ModelTold("m", RequestCounts(), [])], overview(answers))
    assert Series(list(plain(text.decode())))("moe_ray_expert_layer_rows", expert="0", layer="2") == 30


@on_a_loop
async def test_the_load_of_experts_is_kept_and_never_slow() -> None:
    asked, answer = 0, asyncio.Event()

    async def ask_experts() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        await answer.wait()
        if asked == 2:
            raise RuntimeError("gone")
        return {"experts": [asked]}

    load = KeptLoad(ask_experts)
    began = time.monotonic()
    assert await load.get() == {}
    assert time.monotonic() - began < 2
    answer.set()
    assert await load.get() == {"experts": [1]}
    assert await load.get() == {"experts": [1]}
    assert asked == 1
    load._asked_at -= KEEP_S
    assert await load.get() == {"experts": [1]}, "what failed is not told"
    assert asked == 2


class Silent:
    """A source that says nothing by itself."""

    async def next(self, timeout_s: float | None) -> None:
        return None

    def stop(self, index: int) -> None: ...

    def close(self) -> None: ...


def test_a_token_costs_less_than_two_microseconds(readable_model: Path) -> None:
    """Of a core, beyond what the stream itself takes. The best of several runs, since the machine is shared."""
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=100_000))
    output = JobOutput.of(GenerationJob("j", (Choice(request, 0),)), Tokenizer(readable_model))
    watch = JobWatch(Silent(), output, RequestCounts(), time.perf_counter())
    event, count, best = TokenEvent("r", (7,)), 2000, 1.0
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(count):
            watch._note(0, event)
        best = min(best, (time.perf_counter() - began) / count)
    print(f"{best * 1e6:.2f} µs")
    assert best < 2e-6, f"{best * 1e6:.2f} µs"


def test_what_a_gateway_is_told_of_itself_is_not_text() -> None:
    """`in_process.LOAD` is what a gateway without experts answers."""
    text, kind = expose("", [ModelTold('a "quoted" name', RequestCounts(), [])], in_process.LOAD)
    assert b'model_name="a \\"quoted\\" name"' in text
    assert kind.startswith("text/plain")


def test_several_models_are_told_apart_and_summed_where_there_is_no_label() -> None:
    base, tuned = RequestCounts(), RequestCounts()
    base.output_tokens, tuned.output_tokens = 5, 7
    base.jobs, tuned.jobs = 2, 3
    base.finished["stop"], tuned.finished["stop"] = 1, 4
    base.job_s.observe(1.0)
    tuned.job_s.observe(2.0)
    base.responses, tuned.responses = {200: 2}, {}
    text, _ = expose("", [ModelTold("base", base, []), ModelTold("tuned", tuned, [])], {})
    lines = text.decode().splitlines()
    assert 'vllm:generation_tokens_total{model_name="base"} 5.0' in lines
    assert 'vllm:generation_tokens_total{model_name="tuned"} 7.0' in lines
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tuned"} 4.0' in lines
    assert "tgi_request_count 5.0" in lines
    assert "tgi_request_duration_sum 3.0" in lines
    assert "tgi_request_duration_count 2.0" in lines
    assert 'moe_ray_gateway_http_responses_total{status="200"} 2.0' in lines
    assert sum(line.startswith("# TYPE vllm:generation_tokens_total") for line in lines) == 1
