"""Clients and frameworks as their users have them, unchanged, against the served demo model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, Field
from served import Served

HI = [{"role": "user", "content": "What is the capital of France?"}]
CITIES = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Says the weather", "parameters": CITIES}}


class Place(BaseModel):
    """A city and its country."""

    city: str = Field(pattern="^[A-Z][a-z]{2,9}$")
    population_millions: int = Field(ge=1, le=40)


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and nothing sent to the makers of the clients."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def test_openai(served_demo: Served) -> None:
    from openai import OpenAI

    client: Any = OpenAI(base_url=f"{served_demo.url}/v1", api_key="none")
    asked = {"model": "demo", "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(messages=HI, **asked).choices[0].message.content
    assert "Paris" in whole
    stream = client.chat.completions.create(messages=HI, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    called = client.chat.completions.create(
        messages=HI, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, model="demo", temperature=0
    )
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
    parsed = client.chat.completions.parse(
        messages=HI, response_format=Place, model="demo", max_tokens=100, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Place)
    response = client.responses.create(model="demo", input=HI, temperature=0, max_output_tokens=12)
    assert response.output_text == whole


def test_anthropic(served_demo: Served) -> None:
    from anthropic import Anthropic

    client: Any = Anthropic(base_url=served_demo.url, api_key="none")
    asked = {"model": "demo", "messages": HI, "max_tokens": 12, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked).content[0].text
    assert "Paris" in whole
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole


def test_ollama(served_demo: Served) -> None:
    import ollama

    client: Any = ollama.Client(host=served_demo.url)
    assert client.list().models[0].model.startswith("demo")
    answer = client.chat("demo", HI, options={"temperature": 0, "num_predict": 12})
    assert "Paris" in answer.message.content


def test_hugging_faces_clients(served_demo: Served) -> None:
    from huggingface_hub import InferenceClient

    hub = InferenceClient(base_url=served_demo.url, timeout=60)
    plain = "The capital of France is"
    whole = hub.text_generation(plain, max_new_tokens=6, return_full_text=False)
    assert "Paris" in whole
    assert "".join(hub.text_generation(plain, max_new_tokens=6, return_full_text=False, stream=True)) == whole
    tgi = pytest.importorskip("text_generation", reason="text-generation is not installed")
    assert tgi.Client(served_demo.url).generate(plain, max_new_tokens=6).generated_text == whole


def test_litellm(served_demo: Served) -> None:
    litellm: Any = pytest.importorskip("litellm", reason="litellm is not installed")
    asked = {
        "model": "openai/demo",
        "messages": HI,
        "api_base": f"{served_demo.url}/v1",
        "api_key": "none",
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = litellm.completion(**asked).choices[0].message.content
    assert "Paris" in whole
    assert "".join(part.choices[0].delta.content or "" for part in litellm.completion(stream=True, **asked)) == whole
    through_anthropic = {**asked, "model": "anthropic/demo", "api_base": served_demo.url}
    assert litellm.completion(**through_anthropic).choices[0].message.content == whole


def test_langchain(served_demo: Served) -> None:
    langchain: Any = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = langchain.ChatOpenAI(
        model="demo", base_url=f"{served_demo.url}/v1", api_key="none", temperature=0, max_tokens=60
    )
    whole = chat.invoke("What is the capital of France?").content
    assert "Paris" in whole
    assert "".join(part.content for part in chat.stream("What is the capital of France?")) == whole
    (call,) = chat.bind_tools([TOOL], tool_choice="weather").invoke("How is it in Rome?").tool_calls
    assert call["args"]["city"] in ("Paris", "Rome")
    assert isinstance(chat.with_structured_output(Place, method="json_schema").invoke("Paris?"), Place)


def test_instructor(served_demo: Served) -> None:
    instructor: Any = pytest.importorskip("instructor", reason="instructor is not installed")
    from openai import OpenAI

    plain = OpenAI(base_url=f"{served_demo.url}/v1", api_key="none")
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(plain, mode=mode)
        asked: dict[str, Any] = {"model": "demo", "messages": HI, "max_tokens": 100, "temperature": 0}
        place = client.chat.completions.create(response_model=Place, **asked)
        assert 1 <= place.population_millions <= 40
