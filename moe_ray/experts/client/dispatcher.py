"""Sends the expert calls of a layer to replicas and gathers their rows: hedges late calls, retries failed ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final

from moe_ray.core import AdapterRef, ReplicaLoad
from moe_ray.errors import AdapterNotHeld, ExpertUnavailable, LinkBroken, LinkTimeout, ReplicaBusy, TransportError
from moe_ray.experts.client.accounting import Accounting, Counters
from moe_ray.experts.client.adapter_table import AdapterAsker, AdapterTable
from moe_ray.experts.client.assignment import Assigner
from moe_ray.experts.client.call import ENDED, Attempt, Call, CallEvent, CallState, ids_of
from moe_ray.experts.client.call_rows import assemble, batch_of, where_sent
from moe_ray.experts.client.hedging import HedgePolicy
from moe_ray.experts.client.in_flight import InFlightLayer
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica import Replica
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.model.moe import Gathered, Routed
from moe_ray.transport.base import Outcome, Replies, scatter

logger = logging.getLogger(__name__)

SILENCE_CHECK_S: Final = 0.5
"""How often the machines of replicas that owe an answer are checked."""
TURN_S: Final = 0.001
"""How long each of several groups of replies is waited for in turn."""
QUEUED_CHECK_S: Final = 0.02
"""How often a call without a replica is looked at while others are in flight."""
BUSY_RETRY_S: Final = 0.01
"""After how long a call is sent again that a busy replica did not accept."""


class ExpertDispatcher:
    """All experts of one model, wherever they live. `submit`, `gather` and `abandon` belong to one thread."""

    def __init__(
        self, table: ReplicaTable, options: DispatchOptions | None = None, asker: AdapterAsker | None = None
    ) -> None:
        """`asker` tells the replicas of `table` which adapters are wanted; None: they hold none."""
        self.table = table
        self.options = options or DispatchOptions()
        self._adapters = AdapterTable(table, asker, self.options.deadline_s)
        self.hedging = HedgePolicy(budget=self.options.hedge_budget)
        self._accounting = Accounting()
        self._assigner = Assigner(table, self._accounting, self.options.node_id, self.options.split)

    @property
    def counters(self) -> Counters:
        """What was done since the start."""
        return self._accounting.counters

    def missing(self) -> list[int]:
        """Experts that have no live replica for some layer, ascending."""
        return self.table.missing()

    def close(self) -> None:
        """Close every link."""
        self.table.close()

    def hold(self, adapter: AdapterRef) -> None:
        """`AdapterTable.hold`: return once every expert holds its part of an adapter. Raises `AdapterUnavailable`."""
        self._adapters.hold(adapter)

    def drop(self, adapter_id: int) -> None:
        """Have the experts forget an adapter."""
        self._adapters.drop(adapter_id)

    def submit(self, layer: int, routed: Routed) -> InFlightLayer:
        """Send the rows of one layer, without waiting. Raises `InvalidCall` for rows that no carrier could carry."""
        if not (self.options.in_process or self.options.card_rows):
            routed = routed.on_host()
        adapters = () if routed.token_adapters is None else routed.adapters
        assigned = self._assigner.assign(layer, routed.counts, adapters)
        flight = InFlightLayer(self, layer, routed, [call for call, _ in assigned], time.monotonic())
        sendable = [(call, replica) for call, replica in assigned if replica is not None]
        if sendable:
            flight.first = self._send(flight, sendable, CallEvent.SENT, whole=len(sendable) == len(assigned))
        return flight

    def gather(self, flight: InFlightLayer) -> Gathered:
        """Wait for the rows of each call, as `options` say.

        Raises `ExpertUnavailable` for a call that has failed, and abandons the others.
        """
        try:
            self._drive(flight)
        except BaseException:
            self.abandon(flight)
            raise
        if not any(call.retried for call in flight.calls):
            self._record_latency(flight)
        return assemble(flight.calls, flight.routed, flight.first)

    def _drive(self, flight: InFlightLayer) -> None:
        """Send, receive, hedge and retry until each call has ended."""
        late_at = self._late_at(flight)
        check_at = flight.sent_at + SILENCE_CHECK_S
        while True:
            version = self.table.version
            self._send_queued(flight)
            open_calls = [call for call in flight.calls if call.state not in ENDED]
            if not open_calls:
                return
            now = time.monotonic()
            if not any(call.attempts for call in open_calls):
                self._wait_for_replicas(open_calls, version, now)
                continue
            self._receive(open_calls, min(late_at, check_at) - now)
            now = time.monotonic()
            if now >= late_at:
                late_at = float("inf")
                self._hedge(flight, open_calls, now)
            if now >= check_at:
                check_at = now + SILENCE_CHECK_S
                self._check_silence(open_calls)
            self._time_out(open_calls, now)

    def abandon(self, flight: InFlightLayer) -> None:
        """Stop waiting for the calls that were not gathered. Idempotent."""
        for call in flight.calls:
            for attempt in call.attempts:
                attempt.replies.forget(attempt.index)
                self._accounting.released(attempt.replica, call.count)
            call.attempts.clear()

    # --- sending

    def _send(
        self, flight: InFlightLayer, assigned: Sequence[tuple[Call, Replica]], event: CallEvent, whole: bool = False
    ) -> Replies:
        """Send each call to its replica, in one step. `whole`: they are all calls of the layer."""
        links = [replica.link for _, replica in assigned]
        routed = where_sent(flight.routed, links, self.options)
        replies = scatter(links, batch_of([call for call, _ in assigned], routed, whole, self.options.numbers))
        now = time.monotonic()
        for index, (call, replica) in enumerate(assigned):
            self._accounting.sent(replica, call.count)
            call.attempts.append(Attempt(replica, replies, index, now, hedge=event is CallEvent.HEDGED))
            call.apply(event)
        return replies

    def _send_queued(self, flight: InFlightLayer) -> None:
        """Send each queued call to a replica, or end it as `options.on_loss` says where it has none."""
        for call in flight.calls:
            if call.state is not CallState.QUEUED or time.monotonic() < call.retry_at:
                continue
            replica = self._assigner.select(call)
            if replica is not None:
                if call.retried:
                    self.counters.retries += 1
                self._send(flight, [(call, replica)], CallEvent.SENT)
                continue
            reason = self._reason_to_end(call)
            if reason is not None:
                self._end(call, reason)

    def _reason_to_end(self, call: Call) -> str | None:
        """Why a call without a replica ends now; None while it waits for one."""
        if call.refusals:  # each replica that exists has answered with an error: waiting changes nothing
            return "; ".join(map(str, call.refusals.values()))
        if self.options.on_loss != "wait":
            return "no live replica"
        now = time.monotonic()
        if call.deadline is None:
            call.deadline = now + self.options.deadline_s
        if now >= call.deadline:
            return f"no live replica within {self.options.deadline_s:g} s"
        return None

    def _end(self, call: Call, reason: str) -> None:
        error = f"expert {call.expert} (layer {call.layer}) is unavailable: {reason}"
        if self.options.on_loss != "renormalise":
            call.apply(CallEvent.GIVEN_UP)
            raise ExpertUnavailable(error)
        call.apply(CallEvent.LEFT_OUT)
        logger.warning("left out of its tokens: %s", error)

    # --- receiving

    def _receive(self, open_calls: Sequence[Call], timeout_s: float) -> None:
        """Wait for replies, at most `timeout_s`, and settle what was answered or has failed."""
        groups: dict[int, tuple[Replies, list[tuple[Call, Attempt]]]] = {}
        for call in open_calls:
            for attempt in call.attempts:
                groups.setdefault(id(attempt.replies), (attempt.replies, []))[1].append((call, attempt))
        if len(groups) > 1:
            timeout_s = TURN_S
        elif any(call.state is CallState.QUEUED for call in open_calls):
            timeout_s = min(timeout_s, QUEUED_CHECK_S)
        for replies, attempts in groups.values():
            outcomes = replies.wait(max(0.0, timeout_s))
            for call, attempt in attempts:
                if attempt in call.attempts:  # else the other of two has been answered meanwhile
                    self._settle(call, attempt, outcomes[attempt.index])

    def _settle(self, call: Call, attempt: Attempt, outcome: Outcome) -> None:
        if outcome is None:
            return
        call.attempts.remove(attempt)
        if isinstance(outcome, ReplicaLoad):
            self._answered(call, attempt, outcome)
        else:
            self._faulted(call, attempt, outcome)

    def _answered(self, call: Call, attempt: Attempt, load: ReplicaLoad) -> None:
        self._accounting.answered(attempt.replica, call.count, load)
        call.apply(CallEvent.ANSWERED)
        call.answer = attempt
        if attempt.hedge:
            self.counters.hedge_wins += 1
        for other in call.attempts:
            other.replies.cancel(other.index)
            self._accounting.released(other.replica, call.count)
            self.counters.cancelled += 1
        call.attempts.clear()

    def _faulted(self, call: Call, attempt: Attempt, error: TransportError) -> None:
        replica = attempt.replica
        logger.warning("expert replica %s: %s", replica.replica_id, error)
        self._accounting.faulted(replica, call.count, error)
        call.apply(CallEvent.FAULT)
        call.retried = True
        if call.deadline is None:
            call.deadline = time.monotonic() + self.options.deadline_s
        if isinstance(error, LinkBroken | LinkTimeout):
            self.table.report_broken(replica)
        elif isinstance(error, AdapterNotHeld):
            self._adapters.lost(replica, ids_of(call.adapters))
        elif isinstance(error, ReplicaBusy):
            call.retry_at = time.monotonic() + BUSY_RETRY_S
        else:
            call.refusals[replica.replica_id] = error
        if call.attempts:
            return  # the other of two is still in flight
        if len(call.refusals) >= self.options.max_attempts:
            self._end(call, "; ".join(map(str, call.refusals.values())))
        elif time.monotonic() >= call.deadline:
            self._end(call, f"no answer within {self.options.deadline_s:g} s: {error}")

    def _wait_for_replicas(self, open_calls: Sequence[Call], version: int, now: float) -> None:
        """Nothing is in flight: wait until the table changes from `version`, or a call's time has come."""
        until = min(call.retry_at if call.retry_at > now else call.deadline or now for call in open_calls)
        self.table.wait_change(version, max(0.0, until - now))

    # --- late and silent replicas

    def _late_at(self, flight: InFlightLayer) -> float:
        """When the calls of a layer are late (monotonic seconds); infinity where none could be hedged."""
        never = float("inf")
        if not self.options.hedge or not flight.calls:
            return never
        if all(len(self.table.replicas_of(flight.layer, call.expert)) < 2 for call in flight.calls):
            return never
        limit_s = self.hedging.limit_s(max(call.count for call in flight.calls))
        return flight.sent_at + limit_s if limit_s < self.options.call_timeout_s else never

    def _hedge(self, flight: InFlightLayer, open_calls: Sequence[Call], now: float) -> None:
        """Send each call that is late to a second replica, as far as there are others and the budget allows."""
        for call in open_calls:
            if call.state is not CallState.SENT or call.retried:
                continue
            late = call.attempts[0].replica
            self._accounting.late(late, call.count, now - flight.sent_at)
            second = self._assigner.select_second(call, late)
            if second is None or not self.hedging.take():
                continue
            self._send(flight, [(call, second)], CallEvent.HEDGED)
            self.counters.hedges += 1
            self.table.end_if_silent(late, self.options.node_id)  # it may owe an answer since an earlier call

    def _check_silence(self, open_calls: Iterable[Call]) -> None:
        for replica in {attempt.replica for call in open_calls for attempt in call.attempts}:
            self.table.end_if_silent(replica, self.options.node_id)

    def _time_out(self, open_calls: Iterable[Call], now: float) -> None:
        """End the attempts that have not been answered within `call_timeout_s`."""
        limit_s = self.options.call_timeout_s
        for call in open_calls:
            for attempt in list(call.attempts):
                if now - attempt.sent_at < limit_s:
                    continue
                attempt.replies.forget(attempt.index)
                name = f"expert replica {attempt.replica.replica_id}"
                asked = f"layer {call.layer} expert {call.expert}"
                self._settle(call, attempt, LinkTimeout(f"{name} did not answer {asked} within {limit_s:g} s"))

    def _record_latency(self, flight: InFlightLayer) -> None:
        if flight.calls:
            rows = max(call.count for call in flight.calls)
            self.hedging.record_latency(rows, time.monotonic() - flight.sent_at, len(flight.calls))
