"""What an engine can serve at all. No torch; from any thread."""

from __future__ import annotations

import itertools

from moe_ray.core import Request
from moe_ray.errors import ContextLengthExceeded, InvalidRequest


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Raise `InvalidRequest` naming the field if an idle engine of these limits could not serve a request."""
    sampling, total = request.sampling, len(request.prompt_token_ids) + len(request.output_token_ids)
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt is empty", "prompt")
    most = sampling.max_tokens
    # Log-probabilities of a prompt may be asked for without a token behind it.
    if total + (most != 0) > max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens; the prompt has {total}, "
            f"which leaves no room to generate",
            "prompt",
        )
    if most is not None and len(request.output_token_ids) >= most and (most or sampling.empty):
        raise InvalidRequest(f"all max_tokens ({most}) were generated already", "output_token_ids")
    for param, ids in (
        ("prompt", request.prompt_token_ids),
        ("output_token_ids", request.output_token_ids),
        ("logit_bias", tuple(sampling.logit_bias)),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("bad_words_ids", tuple(itertools.chain.from_iterable(sampling.bad_words_ids))),
    ):
        if ids and (min(ids) < 0 or max(ids) >= vocab_size):
            raise InvalidRequest(f"token ids of `{param}` must be between 0 and {vocab_size - 1}", param)
