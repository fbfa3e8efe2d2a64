"""One step of decoding as recordings, a part between scatter and gather each, and a pass that replays them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from moe_ray.model import moe
from moe_ray.model.compute.torch.ops import StepAttention
from moe_ray.model.compute.torch.plan import power_of_two
from moe_ray.model.compute.torch.recorders import Recorder, Recording, Tensors


class Launched(Protocol):
    """A pass whose methods launch as they are called: what is recorded. As `Pass`, but for what is told here."""

    state: Tensors
    """All that the next method goes on from, in one order."""

    def embed(self) -> None:
        """Begin: with the embeddings of the step's tokens."""
        ...

    def route_all(self, layer: int) -> moe.Routed | None:
        """`route` of all P rows: what pads the batch comes last, and is in no count."""
        ...

    def has_shared(self, layer: int) -> bool:
        """Whether `add_shared` adds anything."""
        ...

    def add_shared(self, layer: int) -> None: ...

    def combine_all(self, rows: torch.Tensor) -> None:
        """Add what the experts made of what was routed last: rows [P * K, D], of which T * K count."""
        ...

    def all_logits(self) -> torch.Tensor:
        """Logits float32 [P, V] of all positions."""
        ...


def of_tokens(routed: Tensors, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Routed.tensors` of the first `tokens`, of those of all with what pads them: views."""
    rows, weights, counts, row_of = routed
    if len(row_of) == tokens:
        return rows, weights, counts, row_of
    count = tokens * row_of.shape[1]
    return rows[:count], weights[:count], counts, row_of[:tokens]


class LaneMemory:
    """What recordings of which one at a time is under way hold together, one after the other."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._pool = recorder, recorder.pool()
        self._answers: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._pool.nbytes + (0 if self._answers is None else self._answers.nbytes)

    def record(self, run: Callable[[], Tensors]) -> Recording:
        """Raises `RuntimeError` for what cannot be recorded."""
        return self._recorder.record(run, self._pool)

    def answers(self, count: int, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[count, D] where rows of experts are put, layer after layer. Recordings keep what they were given first."""
        held = self._answers
        if held is None or len(held) < count or held.dtype != like.dtype or held.shape[1:] != like.shape[1:]:
            held = torch.zeros(power_of_two(count), *like.shape[1:], dtype=like.dtype, device=device)
            self._answers = held
        return held[:count]


class StepRecording:
    """One key's parts, each recorded when the first pass comes to it."""

    def __init__(self, held: Launched, step: StepAttention, memory: LaneMemory) -> None:
        """`held`: the pass whose methods are recorded, over `step`, whose tensors become the inputs."""
        self.held, self._step, self._memory = held, step, memory
        self.fault = ""
        """Why a part could not be recorded; from then on all are launched as they come."""
        self.is_whole = False
        """All parts are recorded."""
        self.answers: torch.Tensor | None = None
        """[P * K, D] where the experts' rows are put, layer after layer."""
        self._parts: dict[str, Recording] = {}
        self._last: Recording | None = None

    def begin(self, step: StepAttention) -> RecordedPass:
        """A pass of another step of this key."""
        if step is not self._step:
            self._step.take(step)
        return RecordedPass(self, step.num_tokens)

    def part(self, name: str, run: Callable[[], Tensors]) -> Tensors:
        """Go through a part, whose `run` calls methods of `held`; what that returned, filled anew."""
        if self.fault:
            return run()
        part = self._parts.get(name)
        if part is None:
            before = self.held.state
            try:
                part = self._recorded(run)
            except RuntimeError as error:
                self.fault = str(error).partition("\n")[0]
                self.held.state = before
                return run()
            if self._last is not None:
                self._last.release()  # this part has read it, and those behind go on from this one's state
            self._last = self._parts[name] = part
        part.replay()
        size = len(self.held.state)
        self.held.state = part.outputs[:size]
        return part.outputs[size:]

    def end(self) -> None:
        """All parts are there, and what the last has put out is copied."""
        if self._last is not None and not self.fault:
            self._last.release()
            self.held.state = self._last.outputs[: len(self.held.state)]
            self._last, self.is_whole = None, True

    def _recorded(self, run: Callable[[], Tensors]) -> Recording:
        previous, first = self._last, self.held.state if self._last is None else ()

        def again() -> Tensors:
            self.held.state = first if previous is None else previous.outputs[: len(self.held.state)]
            returned = run()
            return (*self.held.state, *returned)

        again()  # what it needs is compiled and loaded now, which cannot be recorded
        return self._memory.record(again)

    def take_answers(self, routed: moe.Routed, rows: torch.Tensor, count: int) -> None:
        """Put what experts made of `routed`, rows [T * K, D], where the next part reads `count` of them."""
        if self.answers is None:
            self.answers = self._memory.answers(count, rows, routed.rows.device)
        routed.brought(rows, into=self.answers[: len(rows)])

    def add_answers(self) -> None:
        """Add what the experts made of what was routed last; a part's first launches."""
        assert self.answers is not None, "parts are recorded in their order"
        self.held.combine_all(self.answers)


class RecordedPass:
    """`Pass` that replays. What it routes is overwritten by the parts that come behind."""

    def __init__(self, recording: StepRecording, num_tokens: int) -> None:
        self._recording, self._num_tokens, self.is_done = recording, num_tokens, False
        self._answered = False
        """The experts' rows have come, and are not added yet: the next part begins with that."""
        self._routed_rows = 0
        """P * K."""

    def route(self, layer: int) -> moe.Routed | None:
        recording, held, answered = self._recording, self._recording.held, self._take_answered()

        def run() -> Tensors:
            if layer == 0:
                held.embed()
            if answered:
                recording.add_answers()
            routed = held.route_all(layer)
            return () if routed is None else routed.tensors()

        tensors = recording.part(f"route {layer}", run)
        if not tensors:
            return None
        self._routed_rows = len(tensors[0])
        return moe.Routed(*of_tokens(tensors, self._num_tokens))

    def add_shared(self, layer: int) -> None:
        held = self._recording.held
        if held.has_shared(layer):

            def run() -> Tensors:
                held.add_shared(layer)
                return ()

            self._recording.part(f"shared {layer}", run)

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        self._recording.take_answers(routed, rows, self._routed_rows)
        self._answered = True

    def logits(self, rows: list[int]) -> torch.Tensor:
        recording, held, answered = self._recording, self._recording.held, self._take_answered()

        def run() -> Tensors:
            if answered:
                recording.add_answers()
            return (held.all_logits(),)

        (logits,) = recording.part("logits", run)
        # A copy: the next step fills them anew, maybe before all is sampled.
        if rows == list(range(self._num_tokens)):
            wanted = logits[: self._num_tokens].clone()
        else:
            wanted = logits[torch.tensor(rows, dtype=torch.long).to(logits.device, non_blocking=True)]
        del logits
        recording.end()
        self.is_done = True
        return wanted

    def _take_answered(self) -> bool:
        answered, self._answered = self._answered, False
        return answered
