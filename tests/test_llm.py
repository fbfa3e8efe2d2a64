"""The offline API: its arguments as vLLM takes them, and nothing misread in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.llm import LLM
from moe_ray.sampling import Grammar
from moe_ray.text.bad_words import bad_words_ids

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(readable_model: Path) -> LLM:
    return LLM(readable_model, dtype="float32", engine={"kv_cache_gib": 0.02, "max_waiting": 20, "max_num_seqs": 8})


def texts(outputs: list[Any]) -> list[str]:
    return [output.text for output in outputs]


def test_any_number_of_prompts(llm: LLM) -> None:
    """Far more than may wait in the engine."""
    prompts = [[5 + i % 400, 7] for i in range(150)]
    finished: list[int] = []
    outputs = llm.generate(prompts, GREEDY, on_step=lambda done, total: finished.append(done) or None)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(len(output.token_ids) == 3 for output in outputs)
    assert finished == list(range(1, 151))
    for which in (0, 70, 149):
        assert outputs[which].token_ids == llm.generate(prompts[which], GREEDY)[0].token_ids
    assert llm.generate([], GREEDY) == []


def test_one_sampling_params_for_all_or_one_each(llm: LLM) -> None:
    prompts = [[5, 6], [7, 8]]
    lengths = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 4)]
    assert [len(output.token_ids) for output in llm.generate(prompts, lengths)] == [1, 4]
    assert [len(output.token_ids) for output in llm.generate(prompts)] != []
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 1 prompts"):
        llm.generate([[5, 6]], lengths)
    for wrong in ({"temperature": 0}, [{"temperature": 0}], 3):
        with pytest.raises(InvalidRequest, match="sampling_params") as error:
            llm.generate([[5, 6]], wrong if not isinstance(wrong, int) else [wrong])  # type: ignore[arg-type,list-item]
        assert error.value.param == "sampling_params"


def test_bad_words_are_no_part_of_the_output(llm: LLM) -> None:
    first = replace(GREEDY, max_tokens=1)
    for token in range(5, 512):
        [output] = llm.generate([5, token], first)
        ids = bad_words_ids([output.text], llm.tokenizer) if output.text else ()
        if (output.token_ids[0],) in ids and max(map(max, ids)) < 512:
            break
    [without] = llm.generate([5, token], replace(first, bad_words=(output.text,)))
    assert without.token_ids != output.token_ids


def test_prompts_in_every_form(llm: LLM) -> None:
    ids = [5, 6, 7]
    wanted = llm.generate(ids, GREEDY)[0].text
    array = np.array(ids)
    forms: list[Any] = [
        ids,
        tuple(ids),
        array,
        list(array),
        [ids],
        [tuple(ids)],
        np.array([ids]),
        {"prompt_token_ids": ids},
        [{"prompt_token_ids": ids}],
        [{"prompt_token_ids": ids, "prompt": "the text of it"}],
        [{"prompt": None, "prompt_token_ids": ids}],
    ]
    for form in forms:
        assert texts(llm.generate(form, GREEDY)) == [wanted], form
    text = "\n"  # of one token that is in the small vocabulary
    assert llm.generate(text, GREEDY) == llm.generate([text], GREEDY) == llm.generate({"prompt": text}, GREEDY)
    assert "".join(llm.stream({"prompt_token_ids": ids}, GREEDY)) == wanted
    mixed = llm.generate([text, ids, {"prompt": text}], GREEDY)
    assert [output.prompt_token_ids for output in mixed][1] == ids


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        5,
        b"bytes",
        [5, "a"],
        ["a", 5],
        [[5, 6], 7],
        [[5], ["a"]],
        [[]],
        [5.0, 6.0],
        np.array([0.5]),
        [True, False],
        [None],
        {},
        {"prompt": None},
        {"prompt": [5]},
        {"prompt_token_ids": "abc"},
        {"prompt": "a", "multi_modal_data": {}},
        [{"text": "a"}],
        [""],
        [[5], [600]],
        [[5], [-1]],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_before_anything_runs(llm: LLM, prompts: Any) -> None:
    steps = llm.stats.steps
    with pytest.raises(InvalidRequest):
        llm.generate(prompts, GREEDY)
    assert llm.stats.steps == steps
    assert llm.stats.num_running == llm.stats.num_waiting == 0


def test_a_stop_string_without_a_list_is_one_stop_string(llm: LLM) -> None:
    base: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    whole = llm.generate([5, 6, 7], SamplingParams(**base))[0]
    stop = whole.text[4:7]
    for form in (stop, [stop], (stop,)):
        cut = llm.generate([5, 6, 7], SamplingParams(**base, stop=form))[0]
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    by_token = llm.generate([5, 6, 7], SamplingParams(**base, stop_token_ids=[whole.token_ids[3]], logit_bias=None))[0]
    assert by_token.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[3]) + 1]


def test_no_tokens_and_seeds(llm: LLM) -> None:
    (none,) = llm.generate([5, 6], SamplingParams(max_tokens=0))
    assert (none.text, none.token_ids, none.finish_reason) == ("", [], "length")
    drawn = [llm.generate([5, 6], SamplingParams(max_tokens=12, temperature=2.0, seed=-1))[0].token_ids for _ in "ab"]
    assert drawn[0] != drawn[1]
    fixed = [llm.generate([5, 6], SamplingParams(max_tokens=12, temperature=2.0, seed=-7))[0].token_ids for _ in "ab"]
    assert fixed[0] == fixed[1]


def test_conversations_one_or_many(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's words are not in the small vocabulary: each conversation is its number of messages."""
    monkeypatch.setattr(llm.tokenizer, "apply_chat_template", lambda messages: [5] * len(messages))
    hello = [{"role": "user", "content": "Hello"}]
    one = llm.chat(hello, GREEDY)
    both = llm.chat([hello, hello * 2], GREEDY)
    assert [output.prompt_token_ids for output in both] == [[5], [5, 5]]
    assert one.text == both[0].text


def test_a_grammar(llm: LLM) -> None:
    """One for each prompt, or none; what is wrong with one is raised."""
    params = [replace(GREEDY, max_tokens=20, grammar=grammar) for grammar in (Grammar("regex", "yes|no"), None)]
    held, free = llm.generate([[30, 31], [30, 31]], params)
    assert held.text in ("yes", "no")
    assert held.finish_reason == "stop"
    assert free.token_ids == llm.generate([30, 31], params[1])[0].token_ids
    assert "".join(llm.stream([30, 31], params[0])) == held.text
    with pytest.raises(InvalidRequest, match="parenthesis is not closed") as error:
        llm.generate([30, 31], SamplingParams(grammar=Grammar("regex", "(a")))
    assert error.value.param == "grammar"
