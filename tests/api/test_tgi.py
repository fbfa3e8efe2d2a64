"""TGI's routes over a trunk in this process: what is sent, what comes back, to the byte where clients read bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process import Trunk, served_beside

from moe_ray.api.failure import failure_of
from moe_ray.api.service import HttpOptions
from moe_ray.api.tgi.errors import stream_error
from moe_ray.api.tgi.limits import TgiLimits
from moe_ray.errors import EngineError, ExpertUnavailable, IncompleteGeneration
from moe_ray.text.tokenizer import Tokenizer

INPUT = "The capital of France"
MOST = 512
"""Tokens of input and output of the model."""


@pytest.fixture(scope="module")
def http(text_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=text_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(kernel_model: Path) -> Tokenizer:
    return Tokenizer(kernel_model)


def ask(http: httpx.Client, path: str = "/generate", inputs: str = INPUT, **parameters: Any) -> Any:
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 6, **parameters}}
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def details(http: httpx.Client, **parameters: Any) -> dict[str, Any]:
    return ask(http, details=True, **parameters)["details"]


def stream(http: httpx.Client, path: str = "/generate_stream", **parameters: Any) -> list[dict[str, Any]]:
    """The events of a stream, its bytes checked."""
    body: dict[str, Any] = {"inputs": INPUT, "parameters": {"max_new_tokens": 6, **parameters}}
    if path != "/generate_stream":
        body["stream"] = True
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(block.startswith("data:{") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data:")) for block in blocks]


# ---- whole answers


def test_a_plain_answer_has_its_text_alone(http: httpx.Client) -> None:
    whole = ask(http)
    assert set(whole) == {"generated_text"}
    assert whole["generated_text"]
    assert ask(http, "/") == [{"generated_text": INPUT + whole["generated_text"]}], "the root begins with the input"
    assert ask(http, "/", return_full_text=False) == [whole]
    assert ask(http, return_full_text=True)["generated_text"] == INPUT + whole["generated_text"]


def test_details_tell_each_token(http: httpx.Client, tokenizer: Tokenizer) -> None:
    whole = ask(http, details=True, top_n_tokens=3)
    found = whole["details"]
    assert set(found) == {"finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"}
    assert (found["finish_reason"], found["generated_tokens"], found["seed"]) == ("length", 6, None)
    assert found["prefill"] == []
    assert "".join(token["text"] for token in found["tokens"]) == whole["generated_text"]
    assert tokenizer.decode([token["id"] for token in found["tokens"]]) == whole["generated_text"]
    for token, top in zip(found["tokens"], found["top_tokens"], strict=True):
        assert set(token) == {"id", "text", "logprob", "special"}
        assert token == top[0], "greedy: the likeliest"
        assert [each["logprob"] for each in top] == sorted((each["logprob"] for each in top), reverse=True)
        assert len(top) == 3
    assert "top_tokens" not in details(http)


def test_the_headers_tell_how_long_it_took(http: httpx.Client) -> None:
    response = http.post("/generate", json={"inputs": "Häuser", "parameters": {"max_new_tokens": 4}})
    told = response.headers
    assert told["x-compute-type"] == "cpu"
    assert (told["x-compute-characters"], told["x-generated-tokens"]) == ("6", "4")
    assert int(told["x-prompt-tokens"]) >= 1
    total, parts = int(told["x-total-time"]), ("validation", "queue", "inference")
    assert total - 3 <= sum(int(told[f"x-{part}-time"]) for part in parts) <= total
    assert float(told["x-compute-time"]) * 1000 == pytest.approx(total, abs=1)
    assert int(told["x-time-per-token"]) <= int(told["x-inference-time"]) / 4


def test_the_queue_is_measured_by_the_trunk(http: httpx.Client, text_trunk: Trunk) -> None:
    text_trunk.engine.pause_s = 0.3
    try:
        with http.stream("POST", "/generate_stream", json={"inputs": INPUT, "parameters": {"max_new_tokens": 3}}) as up:
            next(up.iter_raw())  # a step of the first request begins: the next one waits for it
            body = {"inputs": INPUT, "parameters": {"max_new_tokens": 1}}
            told = http.post("/generate", json=body).headers
    finally:
        text_trunk.engine.pause_s = 0.0
    assert 20 <= int(told["x-queue-time"]) <= int(told["x-total-time"])


# ---- how tokens are chosen


def test_sampling_is_what_asks_for_it(http: httpx.Client) -> None:
    greedy = ask(http)["generated_text"]
    assert details(http, temperature=1.0)["seed"] is None, "a temperature of 1 asks for nothing"
    for asked in ({"do_sample": True}, {"temperature": 1.9}, {"top_k": 50}, {"top_p": 0.9}):
        found = ask(http, details=True, seed=7, **asked)
        assert found["details"]["seed"] == 7
        assert found == ask(http, details=True, seed=7, **asked)
    assert ask(http, do_sample=True, seed=1)["generated_text"] != greedy
    without = [http.post("/generate", json={"inputs": INPUT * 125}).json()["generated_text"] for _ in range(2)]
    assert without[0] != without[1], "no parameters at all: sampled, and as long as fits"


def test_seeds_of_64_bits_are_all_different(http: httpx.Client) -> None:
    seeds = (0, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    found = [ask(http, details=True, do_sample=True, seed=seed, max_new_tokens=12) for seed in seeds]
    assert [each["details"]["seed"] for each in found] == list(seeds)
    assert len({each["generated_text"] for each in found}) == len(seeds)
    assert found[-1] == ask(http, details=True, do_sample=True, seed=seeds[-1], max_new_tokens=12)
    drawn = details(http, do_sample=True)["seed"]
    assert 0 <= drawn < 2**64


def test_a_drawn_seed_repeats_its_answer(http: httpx.Client) -> None:
    first = ask(http, details=True, do_sample=True)
    again = ask(http, details=True, do_sample=True, seed=first["details"]["seed"])
    assert again == first


def test_the_best_of_several_is_the_likeliest(http: httpx.Client) -> None:
    found = details(http, do_sample=True, best_of=2)
    (other,) = found["best_of_sequences"]
    assert set(other) == {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    assert other["seed"] != found["seed"]

    def mean(sequence: dict[str, Any]) -> float:
        return sum(token["logprob"] for token in sequence["tokens"]) / sequence["generated_tokens"]

    assert mean(found) >= mean(other)
    assert "details" not in ask(http, do_sample=True, best_of=2)


def test_truncate_keeps_the_end(http: httpx.Client, tokenizer: Tokenizer) -> None:
    end = tokenizer.decode(tokenizer.encode(INPUT)[-2:])
    response = http.post(
        "/generate",
        json={"inputs": INPUT, "parameters": {"max_new_tokens": 6, "truncate": 2, "return_full_text": True}},
    )
    assert response.headers["x-prompt-tokens"] == "2"
    assert response.json()["generated_text"] == INPUT + ask(http, inputs=end)["generated_text"]


def test_the_inputs_tokens_have_log_probabilities(http: httpx.Client, tokenizer: Tokenizer) -> None:
    whole = ask(http, decoder_input_details=True)
    prefill = whole["details"]["prefill"]
    assert [set(token) for token in prefill] == [{"id", "text", "logprob"}] * 4
    assert [token["id"] for token in prefill] == tokenizer.encode(INPUT)
    assert "".join(token["text"] for token in prefill) == INPUT
    assert prefill[0]["logprob"] is None
    for i in range(1, 4):  # the model itself says how likely it is that this token comes next
        before = tokenizer.decode([token["id"] for token in prefill[:i]])
        top = ask(http, inputs=before, details=True, max_new_tokens=1, top_n_tokens=5)["details"]["top_tokens"][0]
        known = {token["id"]: token["logprob"] for token in top}
        assert prefill[i]["logprob"] <= min(known.values()) or prefill[i]["id"] in known
    assert whole["generated_text"] == ask(http)["generated_text"]
    both = ask(http, decoder_input_details=True, best_of=2, do_sample=True)["details"]
    assert both["best_of_sequences"][0]["prefill"] == both["prefill"] == prefill


def test_typical_sampling_draws_from_fewer_tokens(http: httpx.Client) -> None:
    drawn = {ask(http, do_sample=True, seed=seed, max_new_tokens=1)["generated_text"] for seed in range(3)}
    typical = {ask(http, typical_p=1e-9, seed=seed, max_new_tokens=1)["generated_text"] for seed in range(3)}
    assert (len(typical), len(drawn)) == (1, 3)
    assert details(http, typical_p=0.5)["seed"] is not None


def test_penalties_change_the_answer(http: httpx.Client) -> None:
    plain = [token["id"] for token in details(http, max_new_tokens=40)["tokens"]]
    punished = [token["id"] for token in details(http, max_new_tokens=40, repetition_penalty=5.0)["tokens"]]
    assert plain != punished or len(set(plain)) == 40
    assert ask(http, frequency_penalty=-2.0, max_new_tokens=40) is not None


# ---- how sequences end


def test_a_text_ends_with_its_stop_string(http: httpx.Client) -> None:
    tokens = details(http)["tokens"]
    stop = tokens[2]["text"].strip()
    whole = ask(http, details=True, stop=["no such text", stop])
    assert whole["generated_text"].endswith(stop)
    assert whole["details"]["finish_reason"] == "stop_sequence"
    assert whole["details"]["tokens"] == tokens[:3]
    events = stream(http, details=True, stop=[stop])
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"


def test_the_end_token_is_told_and_not_in_the_text(http: httpx.Client, kernel_model: Path, tmp_path: Path) -> None:
    tokens = details(http)["tokens"]
    ending = tmp_path / "model"
    shutil.copytree(kernel_model, ending)
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[3]["id"]}))
    trunk = Trunk(ending)
    try:
        with served_beside(ending, [trunk.info]) as url, httpx.Client(base_url=url, trust_env=False) as client:
            whole = ask(client, details=True)
            last = stream(client, details=True)[-1]
    finally:
        trunk.close()
    assert whole["details"]["finish_reason"] == "eos_token"
    assert [token["id"] for token in whole["details"]["tokens"]] == [token["id"] for token in tokens[:4]]
    assert whole["generated_text"] == "".join(token["text"] for token in tokens[:3])
    assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 4, "seed": None, "input_length": 4}
    assert last["generated_text"] == whole["generated_text"]


# ---- streams


def test_a_stream_has_an_event_for_each_token(http: httpx.Client) -> None:
    whole = ask(http, details=True, top_n_tokens=2)
    events = stream(http, details=True, top_n_tokens=2)
    assert [each["index"] for each in events] == [1, 2, 3, 4, 5, 6]
    assert [each["token"] for each in events] == whole["details"]["tokens"]
    assert [each["top_tokens"] for each in events] == whole["details"]["top_tokens"]
    assert {each["generated_text"] for each in events[:-1]} == {None}
    assert {each["details"] for each in events[:-1]} == {None}
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 6,
        "seed": None,
        "input_length": 4,
    }
    plain = stream(http)
    assert set(plain[0]) == {"index", "token", "generated_text", "details"}
    assert plain[-1]["details"] is None
    assert stream(http, "/")[-1]["generated_text"] == INPUT + whole["generated_text"]


def test_what_fails_in_a_stream_is_an_event(text_trunk: Trunk, kernel_model: Path) -> None:
    options = HttpOptions(headers_within_s=0.05, keep_alive_s=0.05)
    text_trunk.engine.pause_s, text_trunk.engine.error = 0.3, ExpertUnavailable("expert 3 at 10.0.0.3:4711")
    try:
        with served_beside(kernel_model, [text_trunk.info], options=options) as url:
            body = {"inputs": INPUT, "parameters": {"max_new_tokens": 2}}
            failed = httpx.post(f"{url}/generate_stream", json=body, trust_env=False)
            whole = httpx.post(f"{url}/generate", json=body, trust_env=False)
    finally:
        text_trunk.engine.pause_s, text_trunk.engine.error = 0.0, None
    comments, _, event = failed.text.rstrip("\n").rpartition("\n\n")
    assert (failed.status_code, comments[0]) == (200, ":"), "a comment keeps the connection"
    told = json.loads(event.removeprefix("data:"))
    assert told == {"error": "Request failed during generation: expert 3 at …", "error_type": "generation"}
    assert (whole.status_code, whole.headers["retry-after"]) == (503, "1")
    assert whole.json()["error_type"] == "healthcheck"


@pytest.mark.parametrize(
    ("error", "status", "whole", "event"),
    [
        (EngineError("x"), 424, "generation", "generation"),
        (IncompleteGeneration("x"), 500, "incomplete_generation", "incomplete_generation_stream"),
    ],
)
def test_what_the_engine_fails_with(
    http: httpx.Client, text_trunk: Trunk, error: Exception, status: int, whole: str, event: str
) -> None:
    text_trunk.engine.error = error
    try:
        failed = http.post("/generate", json={"inputs": INPUT, "parameters": {"max_new_tokens": 2}})
    finally:
        text_trunk.engine.error = None
    assert (failed.status_code, failed.json()["error_type"]) == (status, whole)
    assert stream_error(failure_of(error))["error_type"] == event


# ---- refusals


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 0, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "temperature": 1.0}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 511. Given: 0"),
    ({"truncate": 512}, "`truncate` must be strictly positive and less than 511. Given: 512"),
    (
        {"max_new_tokens": 509},
        "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 4 `inputs` tokens and 509 `max_new_tokens`",
    ),
    ({"watermark": True}, "`watermark` is not supported"),
    ({"adapter_id": "a/b"}, "`adapter_id`: no adapter 'a/b' is served here"),
    ({"grammar": {"type": "json", "value": "{"}}, "grammar is not valid: "),
    ({"grammar": {"type": "json", "value": {}}}, "grammar is not valid: Grammar must have a 'properties' field"),
    ({"grammar": {"type": "json_schema", "value": {}}}, "grammar is not valid: "),
    ({"grammar": {"type": "regex", "value": {}}}, "grammar is not valid: the value of a regex must be a string"),
    ({"temperature": 3.0}, "`temperature` must be between 0 and 2, got 3.0"),
]


@pytest.mark.parametrize(("parameters", "says"), WRONG)
def test_a_wrong_parameter_has_tgis_message(http: httpx.Client, parameters: dict[str, Any], says: str) -> None:
    refused = http.post("/generate", json={"inputs": INPUT, "parameters": parameters})
    told = refused.json()
    assert (refused.status_code, told["error_type"]) == (422, "validation")
    assert told["error"].startswith(f"Input validation error: {says}")
    if "best_of" not in parameters:
        assert stream(http, **parameters) == [told], "in a stream it is an event"


def test_what_a_stream_cannot_have(http: httpx.Client) -> None:
    (best_of,) = stream(http, best_of=2, do_sample=True)
    assert best_of["error"] == "Input validation error: `best_of` != 1 is not supported when streaming tokens"
    (prefill,) = stream(http, decoder_input_details=True)
    assert prefill["error"].endswith("`decoder_input_details` == true is not supported when streaming tokens")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "the body is not a valid JSON object"),
        (b"[]", "the body is not a valid JSON object"),
        ({}, "`inputs` is required"),
        ({"inputs": ["a"]}, "`inputs`: Input should be a valid string"),
        ({"inputs": "a", "parameters": {"top_k": "1"}}, "`top_k`: Input should be a valid integer"),
        ({"inputs": "a", "parameters": {"seed": -1}}, "`seed`: "),
        ({"inputs": "a", "parameters": {"seed": 2**64}}, "`seed`: "),
        ({"inputs": "a", "parameters": {"max_tokens": 1}}, "`max_tokens` is not supported; did you mean"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "ebnf", "value": "a"}}}, "`grammar.type`: "),
        ({"inputs": "a", "strem": True}, "`strem` is not supported"),
    ],
)
def test_a_wrong_body_is_refused_with_the_field(http: httpx.Client, body: Any, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for path in ("/", "/generate", "/generate_stream"):
        refused = http.post(path, content=content)
        assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
        assert refused.json()["error"].startswith(f"Input validation error: {says}")


def test_where_stream_is_settled_it_may_be_said(http: httpx.Client) -> None:
    body = {"inputs": INPUT, "parameters": {"max_new_tokens": 6}}
    assert http.post("/generate", json={**body, "stream": False}).json() == ask(http)
    assert http.post("/generate_stream", json={**body, "stream": True}).text.startswith("data:")
    for path, stream_too in (("/generate", True), ("/generate_stream", False)):
        refused = http.post(path, json={**body, "stream": stream_too})
        assert (refused.status_code, "`stream`" in refused.json()["error"]) == (422, True)


def test_nesting_without_end_is_refused(http: httpx.Client) -> None:
    deep = "[" * 100_000
    for path, status in (("/generate", 422), ("/tokenize", 400), ("/invocations", 422)):
        assert http.post(path, content=deep.encode()).status_code == status
    grammar = {"type": "json", "value": deep}
    refused = http.post("/generate", json={"inputs": "a", "parameters": {"grammar": grammar}})
    assert refused.status_code == 422


def test_an_empty_input_is_refused(http: httpx.Client) -> None:
    refused = http.post("/generate", json={"inputs": ""})
    assert (refused.status_code, refused.json()["error"]) == (422, "Input validation error: `inputs` cannot be empty")


def test_null_is_as_good_as_nothing(http: httpx.Client) -> None:
    from moe_ray.api.tgi.schemas import TgiParameters

    nulls = dict.fromkeys(TgiParameters.model_fields) | {"max_new_tokens": 6}
    assert ask(http, **nulls) == ask(http)
    asked = http.post("/generate", json={"inputs": INPUT, "parameters": {"max_new_tokens": 6}, "options": {"x": 1}})
    assert asked.json() == ask(http)


def test_limits_are_the_operators(text_trunk: Trunk, kernel_model: Path) -> None:
    limits = TgiLimits(max_best_of=1, max_input_tokens=3, payload_limit_bytes=200, grammars=False, model_id="a/b")
    options = HttpOptions(api_keys=("key",), tgi=limits)
    with served_beside(kernel_model, [text_trunk.info], options=options) as url:
        keyed = httpx.Client(base_url=url, trust_env=False, headers={"Authorization": "Bearer key"})
        with keyed as http, httpx.Client(base_url=url, trust_env=False) as keyless:

            def said(**parameters: Any) -> str:
                refused = http.post("/generate", json={"inputs": INPUT, "parameters": parameters})
                assert refused.status_code == 422
                return refused.json()["error"].removeprefix("Input validation error: ")

            assert said(max_new_tokens=2) == "`inputs` must have less than 3 tokens. Given: 4"
            assert said(best_of=2, do_sample=True) == "`best_of` must be > 0 and <= 1. Given: 2"
            assert said(grammar={"type": "regex", "value": "a"}) == "grammar is not supported"
            large = http.post("/generate", json={"inputs": "x" * 200})
            pieces = http.post("/generate", content=iter([b'{"inputs": "', b"x" * 200, b'"}']))
            for refused in (large, pieces):
                assert refused.status_code == 413
                assert refused.json()["error"] == "Input validation error: the body has more than 200 bytes"
            assert http.get("/info").json()["model_id"] == "a/b"
            assert keyless.get("/ping").status_code == 200
            for refused in (keyless.get("/info"), keyless.post("/generate", json={"inputs": "a"})):
                assert (refused.status_code, refused.json()["error_type"]) == (401, "unauthorized")


# ---- the other routes


def test_info_tells_the_limits(http: httpx.Client) -> None:
    assert http.get("/info").json() == {
        "model_id": "random",
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 0,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": MOST - 1,
        "max_total_tokens": MOST,
        "validation_workers": 1,
        "max_client_batch_size": 4096,
        "router": "moe_ray",
        "version": "0.1.0",
        "sha": None,
        "docker_label": None,
    }


def test_probes(http: httpx.Client) -> None:
    for path in ("/", "/ping", "/health"):
        assert http.get(path).json() == {"status": "ok"}
    assert http.get("/generate").status_code == 405
    assert http.get("/generate").json()["error_type"] == "not_found"


def test_tokenize_tells_places_in_bytes(http: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "Häuser 😀 there"
    spans = http.post("/tokenize", json={"inputs": text}).json()
    assert [set(span) for span in spans] == [{"id", "text", "start", "stop"}] * len(spans)
    assert [span["id"] for span in spans] == tokenizer.encode(text)
    for span in spans:
        assert text.encode()[span["start"] : span["stop"]].decode() == span["text"]
    assert (spans[0]["start"], spans[-1]["stop"]) == (0, len(text.encode()))
    last = http.post("/tokenize", json={"inputs": text, "parameters": {"truncate": 1}}).json()
    assert last == spans[-1:]
    assert http.post("/tokenize", json={"prompt": text}).json()["tokens"] == [span["id"] for span in spans]
    assert http.post("/tokenize", json={"inputs": 1}).json()["error_type"] == "validation"
    for body, says in (({"text": "x"}, "`inputs`, `messages`, `prompt`"), ({"prompt": 1}, "`prompt`")):
        refused = http.post("/tokenize", json=body)
        assert (refused.status_code, says in refused.json()["error"]["message"]) == (400, True)


def test_chat_tokenize_renders_the_template(http: httpx.Client, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    told = http.post("/chat_tokenize", json={"messages": messages}).json()
    assert told["templated_text"] == tokenizer.render_chat(messages)
    assert [span["id"] for span in told["tokenize_response"]] == tokenizer.apply_chat_template(messages)
    refused = http.post("/chat_tokenize", json={"messages": [{"role": "user"}]})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "template_error")


def test_invocations_take_the_body_of_any_api(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert ask(http, "/invocations") == ask(http, "/")
    assert stream(http, "/invocations") == stream(http, "/")
    chat = http.post("/invocations", json={"messages": messages, "max_tokens": 3, "temperature": 0}).json()
    own = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3, "temperature": 0}).json()
    assert chat["choices"] == own["choices"]
    completion = http.post("/invocations", json={"prompt": INPUT, "max_tokens": 6, "temperature": 0}).json()
    assert completion["choices"][0]["text"] == ask(http)["generated_text"]
    streamed = http.post("/invocations", json={"prompt": INPUT, "max_tokens": 2, "stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    for wrong in (b"{", b"[]", b"{}", b'{"inputs": 1}'):
        refused = http.post("/invocations", content=wrong)
        assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert http.post("/invocations", json={"prompt": {}}).json()["error"]["param"] == "prompt", "as OpenAI tells it"


def test_vertex_answers_many_instances(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"messages": messages, "max_tokens": 3, "temperature": 0}
    instances = [{"inputs": INPUT, "parameters": {"max_new_tokens": 6}}, chat]
    texts = http.post("/vertex", json={"instances": instances}).json()["predictions"]
    own = http.post("/v1/chat/completions", json=chat).json()
    assert texts == [ask(http)["generated_text"], own["choices"][0]["message"]["content"]]
    for wrong in ([], [{}], [{"inputs": ""}], [{**chat, "stream": True}]):
        assert http.post("/vertex", json={"instances": wrong}).status_code == 422


def test_the_document_of_the_api_is_true(http: httpx.Client) -> None:
    import jsonschema

    document = http.get("/openapi.json").json()
    posts = {path: methods["post"] for path, methods in document["paths"].items() if "post" in methods}
    for path in ("/", "/generate", "/generate_stream", "/tokenize", "/invocations", "/vertex"):
        schema = posts[path]["requestBody"]["content"]["application/json"]["schema"]
        assert "$ref" not in json.dumps(schema)
        assert "inputs" in json.dumps(schema) or path == "/vertex"
        assert "422" in posts[path]["responses"]
    body = {"inputs": INPUT, "parameters": {"max_new_tokens": 6, "grammar": None, "seed": 2**64 - 1}}
    jsonschema.validate(body, posts["/generate"]["requestBody"]["content"]["application/json"]["schema"])
    answer = posts["/generate"]["responses"]["200"]["content"]["application/json"]["schema"]
    resolvable = {**answer, "components": document["components"]}
    jsonschema.validate(ask(http, details=True, top_n_tokens=1, best_of=2, do_sample=True), resolvable)
    of_events = posts["/generate_stream"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    for event in stream(http, details=True):
        jsonschema.validate(event, of_events["properties"]["data"]["contentSchema"])
