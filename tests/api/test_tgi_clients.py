"""Libraries that people use with TGI, against a gateway in this process: Hugging Face's client and TGI's own."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError
from in_process import Trunk

PROMPT = "The capital of France"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def hub(text_url: str) -> InferenceClient:
    return InferenceClient(base_url=text_url, token="none", timeout=60)


def test_the_hubs_client_generates(hub: InferenceClient) -> None:
    text = hub.text_generation(PROMPT, max_new_tokens=6, return_full_text=False)
    found = hub.text_generation(PROMPT, max_new_tokens=6, details=True, top_n_tokens=2, return_full_text=False)
    assert found.generated_text == text
    assert (found.details.finish_reason, found.details.generated_tokens) == ("length", 6)
    assert "".join(token.text for token in found.details.tokens) == text
    assert [len(top) for top in found.details.top_tokens] == [2] * 6
    scored = hub.text_generation(PROMPT, max_new_tokens=2, details=True, decoder_input_details=True)
    assert [token.logprob is None for token in scored.details.prefill] == [True, False, False, False]
    best = hub.text_generation(PROMPT, max_new_tokens=4, best_of=2, do_sample=True, details=True)
    assert len(best.details.best_of_sequences) == 1


def test_the_hubs_client_streams(hub: InferenceClient) -> None:
    text = hub.text_generation(PROMPT, max_new_tokens=6, return_full_text=False)
    assert "".join(hub.text_generation(PROMPT, max_new_tokens=6, stream=True)) == text
    *_, last = hub.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True, return_full_text=False)
    assert (last.generated_text, last.index) == (text, 6)
    assert (last.details.finish_reason, last.details.input_length) == ("length", 4)


def test_the_hubs_client_chats(hub: InferenceClient) -> None:
    whole = hub.chat_completion(MESSAGES, max_tokens=5, temperature=0)
    pieces = hub.chat_completion(MESSAGES, max_tokens=5, temperature=0, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    named = hub.chat_completion(MESSAGES, max_tokens=5, temperature=0, model="tgi")
    assert named.choices[0].message.content == text


def test_the_hubs_client_knows_the_errors(hub: InferenceClient, text_trunk: Trunk) -> None:
    for wants_stream in (False, True):
        with pytest.raises(ValidationError, match=r"`top_p` must be > 0\.0 and < 1\.0"):
            list(hub.text_generation(PROMPT, top_p=1.0, stream=wants_stream))
    from moe_ray.errors import Overloaded

    text_trunk.engine.error = Overloaded("64 requests wait")
    try:
        with pytest.raises(OverloadedError, match="Model is overloaded"):
            hub.text_generation(PROMPT, max_new_tokens=2)
    finally:
        text_trunk.engine.error = None


def test_the_hubs_client_asks_for_the_endpoint(text_url: str) -> None:
    hub = InferenceClient(provider="hf-inference", model=text_url, token="none", timeout=60)
    assert hub.get_endpoint_info()["max_total_tokens"] == 512
    assert hub.health_check()


# ---- the package text-generation; it asks for an older Hub library, so `make` installs it without what it depends on

tgi = pytest.importorskip("text_generation")


@pytest.fixture(scope="module")
def client(text_url: str) -> tgi.Client:
    return tgi.Client(text_url, timeout=60)


def test_tgis_client_generates(client: tgi.Client) -> None:
    found = client.generate(PROMPT, max_new_tokens=6)
    assert (found.details.finish_reason, found.details.generated_tokens) == ("length", 6)
    assert "".join(token.text for token in found.details.tokens) == found.generated_text
    events = list(client.generate_stream(PROMPT, max_new_tokens=6))
    assert "".join(event.token.text for event in events) == found.generated_text
    assert events[-1].generated_text == found.generated_text
    sampled = client.generate(PROMPT, max_new_tokens=6, do_sample=True, seed=2**64 - 1, temperature=1.5)
    assert sampled.details.seed == 2**64 - 1
    stop = found.details.tokens[1].text.strip()
    assert client.generate(PROMPT, max_new_tokens=6, stop_sequences=[stop]).generated_text.endswith(stop)


def test_tgis_client_chats(client: tgi.Client) -> None:
    whole = client.chat(MESSAGES, max_tokens=5, temperature=0.0)
    assert whole.choices[0].message.content
    assert whole.usage["completion_tokens"] == 5


def test_tgis_client_knows_the_errors(client: tgi.Client) -> None:
    with pytest.raises(tgi.errors.ValidationError, match="must be <= 512"):
        client.generate(PROMPT, max_new_tokens=1000)
    with pytest.raises(tgi.errors.ValidationError, match="must be <= 512"):
        list(client.generate_stream(PROMPT, max_new_tokens=1000))
