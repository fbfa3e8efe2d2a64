"""Steps of decoding as recordings: a pass's launches between scatter and gather, made once, are replayed at once.

A recording fits every step whose launches differ in nothing but the contents of tensors (`StepAttention.key`). Steps
with prompts or adapters are launched as they come.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

import torch

from moe_ray.model import moe
from moe_ray.model.compute.base import KVCacheView
from moe_ray.model.compute.torch.ops import StepAttention
from moe_ray.model.compute.torch.recorders import Recorder, Recording, Tensors

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 1 << 30
"""Of what recordings hold for their outputs; beyond it those that were used longest ago make room."""
AFTER: Final = 2
"""Steps of one key that are launched as they come before the next is recorded: some shapes come once only."""

MOST_SEEN: Final = 10_000
"""Keys whose steps are counted."""

Key = tuple[object, ...]


class Launched(Protocol):
    """A pass whose methods launch as they are called: what is recorded. As `Pass`, but for what is told here."""

    state: Tensors
    """All that the next method goes on from, in one order."""

    def embed(self) -> None:
        """Begin: with the embeddings of the step's tokens."""
        ...

    def route(self, layer: int) -> moe.Routed | None: ...

    def has_shared(self, layer: int) -> bool:
        """Whether `add_shared` adds anything."""
        ...

    def add_shared(self, layer: int) -> None: ...

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None: ...

    def all_logits(self) -> torch.Tensor:
        """Logits float32 [T, V] of all positions."""
        ...


class StepRecording:
    """One key's parts, each recorded when the first pass comes to it."""

    def __init__(self, held: Launched, step: StepAttention, recorder: Recorder) -> None:
        """`held`: the pass whose methods are recorded, over `step`, whose tensors become the inputs."""
        self.held, self._step, self._recorder = held, step, recorder
        self.fault = ""
        """Why a part could not be recorded; from then on all are launched as they come."""
        self._parts: dict[str, Recording] = {}
        self._user: weakref.ref[RecordedPass] | None = None
        self.answers: torch.Tensor | None = None
        """[T * K, D] where the experts' rows are put, layer after layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs of all parts, each of which has its memory for good."""
        held = [each for part in self._parts.values() for each in part.outputs]
        return sum({each.data_ptr(): each.nbytes for each in held}.values())

    @property
    def is_free(self) -> bool:
        """Whether no pass is under way in it: with micro-batches, several of one key are."""
        user = None if self._user is None else self._user()
        return user is None or user.is_done

    def begin(self, step: StepAttention) -> RecordedPass:
        """A pass of another step of this key."""
        if step is not self._step:
            self._step.take(step)
        begun = RecordedPass(self)
        self._user = weakref.ref(begun)
        return begun

    def part(self, name: str, run: Callable[[], Tensors]) -> Tensors:
        """Go through a part, whose `run` calls methods of `held`; what that returned, filled anew."""
        if self.fault:
            return run()
        part = self._parts.get(name)
        if part is None:
            before = self.held.state
            try:
                part = self._parts[name] = self._recorded(run)
            except RuntimeError as error:
                self.fault = str(error).partition("\n")[0]
                self.held.state = before
                return run()
        part.replay()
        size = len(self.held.state)
        self.held.state = part.outputs[:size]
        return part.outputs[size:]

    def _recorded(self, run: Callable[[], Tensors]) -> Recording:
        before = self.held.state

        def again() -> Tensors:
            self.held.state = before
            returned = run()
            return (*self.held.state, *returned)

        again()  # what it needs is compiled and loaded now, which cannot be recorded
        return self._recorder.record(again)


class RecordedPass:
    """`Pass` that replays. What it routes is overwritten by the next pass of its recording."""

    def __init__(self, recording: StepRecording) -> None:
        self._recording, self.is_done = recording, False
        self._answered: moe.Routed | None = None
        """Whose rows have come from the experts, and are not added yet: the next part begins with that."""

    def route(self, layer: int) -> moe.Routed | None:
        held, answered = self._recording.held, self._take_answered()

        def run() -> Tensors:
            if layer == 0:
                held.embed()
            self._add(answered)
            routed = held.route(layer)
            return () if routed is None else routed.tensors()

        tensors = self._recording.part(f"route {layer}", run)
        if not tensors:
            return None
        rows, weights, counts, row_of = tensors
        return moe.Routed(rows, weights, counts, row_of)

    def add_shared(self, layer: int) -> None:
        held = self._recording.held
        if held.has_shared(layer):

            def run() -> Tensors:
                held.add_shared(layer)
                return ()

            self._recording.part(f"shared {layer}", run)

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        recording = self._recording
        if recording.answers is None:
            recording.answers = torch.empty(rows.shape, dtype=rows.dtype, device=routed.rows.device)
        routed.brought(rows, into=recording.answers)
        self._answered = routed

    def logits(self, rows: list[int]) -> torch.Tensor:
        held, answered = self._recording.held, self._take_answered()

        def run() -> Tensors:
            self._add(answered)
            return (held.all_logits(),)

        (logits,) = self._recording.part("logits", run)
        self.is_done = True
        if rows == list(range(len(logits))):
            return logits.clone()  # the next step fills them anew, maybe before all is sampled
        return logits[torch.tensor(rows, dtype=torch.long).to(logits.device, non_blocking=True)]

    def _take_answered(self) -> moe.Routed | None:
        answered, self._answered = self._answered, None
        return answered

    def _add(self, answered: moe.Routed | None) -> None:
        answers = self._recording.answers
        if answered is not None and answers is not None:
            self._recording.held.combine(answered, answers)


class Recordings:
    """Those of one trunk."""

    def __init__(self, recorder: Recorder, most_bytes: int = MOST_BYTES, after: int = AFTER) -> None:
        self._recorder, self._most_bytes, self._after = recorder, most_bytes, after
        self._seen: dict[Key, int] = {}
        self._refused = False
        self._kept: OrderedDict[Key, list[StepRecording]] = OrderedDict()

    def begin(self, make: Callable[[], Launched], step: StepAttention, cache: KVCacheView) -> RecordedPass | None:
        """A pass over a step that a recording fits; None: launch it as it comes. `make`: a pass to be recorded."""
        if step.key is None or self._stopped():
            return None
        key = (id(cache), *step.key)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._seen) > MOST_SEEN:
                self._seen.clear()
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= self._after:
                return None
            kept = self._kept[key] = []
        self._kept.move_to_end(key)
        free = next((each for each in kept if each.is_free), None)
        if free is None:
            self._make_room()
            free = StepRecording(make(), step, self._recorder)
            kept.append(free)
        return free.begin(step)

    def _stopped(self) -> bool:
        """Whether the device has refused: then it is said once, and nothing is recorded any more."""
        fault = next((each.fault for some in self._kept.values() for each in some if each.fault), "")
        if fault:
            logger.warning("steps are launched kernel by kernel, which is slower: they cannot be recorded (%s)", fault)
            self._kept.clear()
            self._refused = True
        return self._refused

    def _make_room(self) -> None:
        """Forget what was used longest ago; the key that was asked for last is kept."""
        sizes = {key: sum(each.nbytes for each in some) for key, some in self._kept.items()}
        total = sum(sizes.values())
        for key in list(self._kept)[:-1]:
            if total <= self._most_bytes:
                return
            total -= sizes[key]
            del self._kept[key]
