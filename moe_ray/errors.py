"""Every error that moe_ray raises on purpose: one tree, mapped to status codes once, at the HTTP/gRPC edge."""

from __future__ import annotations


class MoeRayError(Exception):
    """Base of all moe_ray errors; the message is written for the person who can act on it."""


class ConfigError(MoeRayError):
    """A flag, an environment variable or a key of the configuration is wrong; names it and what is allowed."""


class OverBudget(ConfigError):
    """An actor's weights take more of its card than its budget; names both."""


class CheckpointError(MoeRayError):
    """A checkpoint is missing, truncated, misshapen or of a refused format; names the file and the tensor."""


class AdapterError(MoeRayError):
    """An adapter is missing, misshapen, of a refused kind or of another model; names the file and the key or tensor."""


class KernelsUnavailable(MoeRayError):
    """The native kernels cannot be built or run on this machine; says what is lacking."""


class CardDriverUnavailable(MoeRayError):
    """NVIDIA's driver, or its nvidia-smi, does not answer on this machine; says why."""


class InvalidRequest(MoeRayError):
    """A request breaks a rule of the API (HTTP 400); `param` is the request's field, where one is to blame.

    `code` is OpenAI's name of the rule, where it has one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str | None, str | None]]:
        return type(self), (str(self), self.param, self.code)


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together are longer than the model's context (HTTP 400)."""


class RequestTooLarge(MoeRayError):
    """A request whose body has more bytes than its API takes (HTTP 413)."""


class ModelNotFound(MoeRayError):
    """The request names a model that is not served here (HTTP 404)."""


class ResponseNotFound(MoeRayError):
    """The request names a stored response that is not, or no longer, there (HTTP 404)."""

    param = "response_id"


class Unauthorized(MoeRayError):
    """A request without one of the server's API keys."""


class Forbidden(MoeRayError):
    """A request that may change the server and does not come from its own page (HTTP 403)."""


class Overloaded(MoeRayError):
    """A bounded queue is full (HTTP 429 with Retry-After)."""


class NotReady(MoeRayError):
    """The trunk or an expert is not up yet, or is gone (HTTP 503)."""


class AdapterUnavailable(NotReady):
    """An adapter that is served cannot be loaded now (HTTP 503); names it and says why."""


class ExpertUnavailable(NotReady):
    """No replica of an expert answered before the deadline (HTTP 503); names layer and expert."""


class TransportError(MoeRayError):
    """Base of what can go wrong with a call between a trunk and an expert replica."""


class InvalidCall(TransportError):
    """The caller's own mistake: no carrier can carry this call (shape, dtype, size). It was not sent."""


class CallRefused(TransportError):
    """The replica does not accept the call (a key that it does not hold, rows of another width); others may."""


class AdapterNotHeld(CallRefused):
    """The replica, or this process, does not hold an adapter that a call names; names it. It may be loaded there."""


class ReplicaBusy(TransportError):
    """The replica has as much queued as it accepts; the call may be sent elsewhere, or there later."""


class ExpertFailed(TransportError):
    """The replica received the call and could not compute it; carries the replica's own message."""


class WrongAnswer(TransportError):
    """The replica answered with rows that do not fit the call, or are not finite. They are never used."""


class ProtocolError(TransportError):
    """Bytes on a link that are no message of this protocol, or of another version of it."""


class LinkBroken(TransportError):
    """The connection to a replica is gone or never came up; calls in flight on it are lost and may be sent again."""


class MailboxRefused(TransportError):
    """Rows cannot go through a card's memory on a link (another card or machine, no bindings); they take its socket."""


class LinkTimeout(TransportError):
    """A replica did not answer a call in time; the call may be sent again elsewhere."""


class CallCancelled(TransportError):
    """The trunk cancelled a call before the replica began it."""


class EngineError(MoeRayError):
    """The engine stopped on an internal fault (HTTP 500)."""


class IncompleteGeneration(EngineError):
    """A sequence ended without its last token, or was ended from outside (HTTP 500)."""
