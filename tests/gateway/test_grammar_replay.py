"""A stream whose text must match a grammar, over two trunks of which one is lost in the middle of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from in_process import Trunk, sessions_over

from moe_ray.core import Request, SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.gateway.sessions import Sessions
from moe_ray.sampling import Grammar
from moe_ray.text.tokenizer import Tokenizer

ITEM = {
    "type": "object",
    "properties": {"id": {"enum": [1, 22, 333]}, "ok": {"type": "boolean"}},
    "required": ["id", "ok"],
}
GRAMMAR = Grammar("json_schema", json.dumps({"type": "array", "items": ITEM, "minItems": 6, "maxItems": 6}))


async def tokens_of(sessions: Sessions, request: Request, trunks: Sequence[Trunk] = ()) -> list[int]:
    """The answer's tokens; the one of `trunks` that computes them is closed once there are twenty."""
    session, tokens = sessions.open([(0, request)]), []
    while (told := await session.next(100)) is not None:
        event = told[1]
        assert event.error is None
        tokens += event.token_ids
        if event.last:
            assert event.finish_reason == "stop"
            return tokens
        if trunks and len(tokens) >= 20:
            lost = next(trunk for trunk in trunks if trunk.runtime.stats().num_running)
            trunks = ()
            await asyncio.to_thread(lost.close)
    raise AssertionError("nothing came")


def test_the_grammar_goes_on_where_it_was(readable_model: Path) -> None:
    tokenizer = Tokenizer(readable_model)
    blanks = {i: -100.0 for i in range(512) if set(tokenizer.token_bytes(i)) & set(b" \t\r\n")}
    sampling = SamplingParams(max_tokens=200, seed=4, grammar=GRAMMAR, logit_bias=blanks)
    request = Request("r", (40, 41, 42), sampling)
    first, second = Trunk(readable_model), Trunk(readable_model)
    infos = [replace(first.info, replica_id="a"), replace(second.info, replica_id="b")]

    async def run() -> None:
        async with sessions_over(infos[:1]) as sessions:
            undisturbed = await tokens_of(sessions, request)
            wrong = Request("w", (40,), replace(sampling, grammar=Grammar("regex", "(")))
            told = await sessions.open([(0, wrong)]).next(100)
            assert told is not None
            assert isinstance(told[1].error, InvalidRequest)
            assert told[1].error.param == "grammar"
        assert len(json.loads(tokenizer.decode(undisturbed))) == 6
        first.engine.pause_s = second.engine.pause_s = 0.02
        async with sessions_over(infos) as sessions:
            while len(sessions.trunks) < 2:
                await asyncio.sleep(0.02)
            assert await tokens_of(sessions, request, (first, second)) == undisturbed

    try:
        asyncio.run(run())
    finally:
        first.close()
        second.close()
