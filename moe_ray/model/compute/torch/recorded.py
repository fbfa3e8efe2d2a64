"""Steps of decoding as recordings: a pass's launches between scatter and gather, made once, are replayed at once.

A recording fits every step whose launches differ in nothing but the contents of tensors (`StepAttention.key`): steps
are padded to few numbers of tokens, and how many of them count is in a tensor. Steps with prompts or adapters are
launched as they come.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from moe_ray.model.compute.base import KVCacheView
from moe_ray.model.compute.torch.ops import StepAttention
from moe_ray.model.compute.torch.recorded_step import LaneMemory, Launched, RecordedPass, StepRecording
from moe_ray.model.compute.torch.recorders import Recorder

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 1 << 30
"""Of all that recordings hold; beyond it a lane's are forgotten."""
MOST_KEPT: Final = 64
"""Keys of a lane that are kept: those that were used longest ago make room."""
AFTER: Final = 2
"""Steps of one key that are launched as they come before the next is recorded: some shapes come once only."""
MOST_SEEN: Final = 10_000
"""Keys whose steps are counted."""

Key = tuple[object, ...]


class StepLane:
    """Recordings of which one at a time is under way: they have the same memory, one after the other."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._memory = recorder, LaneMemory(recorder)
        self.kept: OrderedDict[Key, StepRecording] = OrderedDict()
        """By key, that used last at the end."""
        self._user: weakref.ref[RecordedPass] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its recordings hold."""
        return self._memory.nbytes

    @property
    def is_free(self) -> bool:
        """Whether no pass is under way in it."""
        user = None if self._user is None else self._user()
        return user is None or user.is_done

    def forget(self) -> None:
        """Begin anew, without recordings."""
        self.kept.clear()
        self._memory = LaneMemory(self._recorder)

    def begin(self, key: Key, make: Callable[[], Launched], step: StepAttention, most_kept: int) -> RecordedPass:
        """A pass over a step of this key."""
        recording = self.kept.get(key)
        if recording is None or not recording.is_whole:  # what a pass that was given up has begun is no use
            self.kept.pop(key, None)
            while len(self.kept) >= most_kept:
                self.kept.popitem(last=False)
            recording = self.kept[key] = StepRecording(make(), step, self._memory)
        self.kept.move_to_end(key)
        begun = recording.begin(step)
        self._user = weakref.ref(begun)
        return begun


class Recordings:
    """Those of one trunk: a lane for each of the micro-batches of a step, for they are under way at once."""

    def __init__(
        self, recorder: Recorder, most_bytes: int = MOST_BYTES, after: int = AFTER, most_kept: int = MOST_KEPT
    ) -> None:
        self._recorder, self._most_bytes, self._after, self._most_kept = recorder, most_bytes, after, most_kept
        self._seen: dict[Key, int] = {}
        self._refused = False
        self.lanes: list[StepLane] = []

    @property
    def nbytes(self) -> int:
        """Bytes that recordings hold."""
        return sum(lane.nbytes for lane in self.lanes)

    def begin(self, make: Callable[[], Launched], step: StepAttention, cache: KVCacheView) -> RecordedPass | None:
        """A pass over a step that a recording fits; None: launch it as it comes. `make`: a pass to be recorded."""
        if step.key is None or self._stopped():
            return None
        key = (id(cache), *step.key)
        if len(self._seen) > MOST_SEEN:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= self._after:
            return None
        lane = next((each for each in self.lanes if each.is_free), None)
        if lane is None:
            lane = StepLane(self._recorder)
            self.lanes.append(lane)
        if key not in lane.kept and self.nbytes > self._most_bytes:
            logger.info("recorded steps hold %d MiB, more than they may: they are recorded anew", self.nbytes >> 20)
            lane.forget()
        return lane.begin(key, make, step, self._most_kept)

    def _stopped(self) -> bool:
        """Whether the device has refused: then it is said once, and nothing is recorded any more."""
        faults = (each.fault for lane in self.lanes for each in lane.kept.values() if each.fault)
        if (fault := next(faults, "")) != "":
            logger.warning("steps are launched kernel by kernel, which is slower: they cannot be recorded (%s)", fault)
            self.lanes.clear()
            self._refused = True
        return self._refused
