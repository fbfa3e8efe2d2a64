"""The states of an expert call: which events each state allows, and where they lead."""

from __future__ import annotations

import itertools

import pytest

from moe_ray.experts.client.call import ENDED, Call, CallEvent, CallState, next_state

E, S = CallEvent, CallState
ALLOWED = {
    S.QUEUED: {E.SENT: S.SENT, E.GIVEN_UP: S.FAILED, E.LEFT_OUT: S.LOST},
    S.SENT: {E.HEDGED: S.HEDGED, E.ANSWERED: S.DONE, E.FAULT: S.QUEUED},
    S.HEDGED: {E.ANSWERED: S.DONE, E.FAULT: S.SENT},
    S.DONE: {},
    S.FAILED: {},
    S.LOST: {},
}


@pytest.mark.parametrize(("state", "event"), itertools.product(S, E), ids=str)
def test_each_event_in_each_state(state: CallState, event: CallEvent) -> None:
    wanted = ALLOWED[state].get(event)
    if wanted is not None:
        assert next_state(state, event) is wanted
        return
    with pytest.raises(AssertionError, match=f"{state.value} cannot be {event.value}"):
        next_state(state, event)


def test_a_call_has_ended_where_no_event_is_allowed() -> None:
    assert {state for state, events in ALLOWED.items() if not events} == ENDED


def test_a_call_goes_through_its_states() -> None:
    call = Call(layer=0, expert=3, start=4, count=2)
    assert call.row_range == slice(4, 6)
    for event in (E.SENT, E.HEDGED, E.FAULT, E.FAULT, E.SENT, E.ANSWERED):
        call.apply(event)
    assert call.state is S.DONE
