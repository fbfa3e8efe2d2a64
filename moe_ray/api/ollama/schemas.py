"""The bodies of ollama's API, and what of them is not supported."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, model_validator

from moe_ray.api.documented import Documented


class OllamaOptions(Documented):
    """How tokens are chosen. What is left out is as the checkpoint recommends it; ollama has values of its own."""

    model_config = ConfigDict(extra="allow")

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None
    """Most tokens to generate; -1 or -2: until the context is full."""
    num_ctx: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of prompt and answer together, up to what the model takes."""
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    """-1: all tokens so far are penalised, which is the only way here; 0: none."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class OllamaRequest(Documented):
    """What /api/generate and /api/chat share."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    model: str
    stream: bool = True
    form: Annotated[Literal["", "json"] | dict[str, Any], Field(alias="format")] = ""
    """What the text must be: JSON, or JSON of a schema."""
    options: OllamaOptions = OllamaOptions()
    keep_alive: str | float | None = None
    """Accepted: the model is always loaded."""
    think: bool | str = False
    logprobs: bool = False
    top_logprobs: int = 0
    truncate: bool = True
    """Accepted: what does not fit is refused, never cut."""
    shift: bool = True
    """Accepted: an answer ends where the context does."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class OllamaGenerate(OllamaRequest):
    """Body of POST /api/generate."""

    prompt: str = ""
    """Without one the model is loaded, which it is."""
    suffix: Literal[""] = ""
    system: str = ""
    template: Literal[""] = ""
    context: list[int] = []
    """`context` of an answer, which this prompt goes on from."""
    raw: bool = False
    """The prompt is the whole text: no chat template."""
    images: Annotated[list[Any], Field(max_length=0)] = []


class OllamaFunction(Documented):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(Documented):
    """A tool."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaCalled(Documented):
    """What is called, and with what."""

    model_config = ConfigDict(extra="ignore")

    index: int | None = None
    name: str
    arguments: dict[str, Any]


class OllamaCall(Documented):
    """One call of a tool."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    function: OllamaCalled


class OllamaMessage(Documented):
    """One turn of a conversation. `thinking` is left out of the prompt."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChat(OllamaRequest):
    """Body of POST /api/chat."""

    messages: list[OllamaMessage] = []
    """Without any the model is loaded, which it is."""
    tools: list[OllamaTool] = []


class OllamaName(Documented):
    """Body of routes about one model."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    name: str = ""
    """Older name of `model`."""
    stream: bool = True


class OllamaTokenLogprob(Documented):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class OllamaLogprob(OllamaTokenLogprob):
    """A token of the answer, and those that were likely in its place."""

    top_logprobs: list[OllamaTokenLogprob] | None = None


class OllamaTimes(Documented):
    """What an answer, or a line of it, says of itself; the durations, in nanoseconds, come with the last line."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    """Before the prompt reached the engine: waiting for a trunk, reading the prompt."""
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    """Until the first token, with the time in the queue."""
    eval_count: int | None = None
    eval_duration: int | None = None
    """From the first token to the last."""
    logprobs: list[OllamaLogprob] | None = None


class OllamaGenerated(OllamaTimes):
    """Answer of /api/generate, or a line of it."""

    response: str
    context: list[int] | None = None


class OllamaSaid(Documented):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[OllamaCall] | None = None


class OllamaAnswer(OllamaTimes):
    """Answer of /api/chat, or a line of it."""

    message: OllamaSaid


class OllamaError(Documented):
    """Answer to a request that failed, or the last line of a stream that did."""

    error: str


class OllamaDetails(Documented):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Documented):
    """The model under one of its names."""

    name: str
    model: str
    modified_at: str | None = None
    expires_at: str | None = None
    """Of a loaded model."""
    size: int
    size_vram: int | None = None
    """Always 0: the gateway does not know where trunks and experts hold it."""
    digest: str
    details: OllamaDetails
    context_length: int | None = None


class OllamaModels(Documented):
    """Answer to GET /api/tags and GET /api/ps."""

    models: list[OllamaModel]


class OllamaShown(Documented):
    """Answer to POST /api/show."""

    model_config = ConfigDict(protected_namespaces=())

    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, str | int | float]
    capabilities: list[str]
    modified_at: str


class OllamaPulled(Documented):
    """Answer to POST /api/pull, or its one line."""

    status: Literal["success"]


class OllamaVersion(Documented):
    """Answer to GET /api/version."""

    version: str
    """Of ollama, whose API is spoken here: clients ask for a least one."""
    moe_ray: str


HARMLESS_OPTIONS: Final = frozenset(
    {
        *("f16_kv", "low_vram", "main_gpu", "num_batch", "num_gpu", "num_keep", "num_thread", "numa"),
        *("mirostat_eta", "mirostat_tau", "use_mlock", "use_mmap"),
    }
)
"""Options about how ollama loads a model and computes, or that only count beside one that is refused."""

NEUTRAL_OPTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "embedding_only": (False,),
    "logits_all": (False,),
    "mirostat": (0,),
    "penalize_newline": (True,),
    "tfs_z": (1,),
    "vocab_only": (False,),
}
"""Option → the values with which it asks for nothing. Any other value would change the answer, so it is refused."""
