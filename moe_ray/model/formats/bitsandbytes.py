"""bitsandbytes' weights (Dettmers et al. 2022, arXiv:2208.07339; 2023, arXiv:2305.14314), as transformers saves them.

4 bits: value[i] = quant_map[code[i]] * absmax[i // blocksize] over the weight's elements in their order, two codes a
byte, the first in its upper half. Nested, absmax[b] is nested_quant_map[absmax[b]] * nested_absmax[b //
nested_blocksize] + nested_offset. 8 bits: value[n, k] = weight[n, k] * SCB[n] / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.integers import expect_shape
from moe_ray.model.formats.weight_format import BadTensor, Place, ShapeMismatch, Source, StoredWeight, TensorPart

if TYPE_CHECKING:
    import numpy as np

CODES: Final = "weight"
ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS = "absmax", "quant_map", "nested_absmax", "nested_quant_map"
STATES: Final = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
ROW_MAJOR: Final = 0
"""Of `weight_format`; the others are orders of one card's kernel."""


@dataclass(frozen=True, slots=True)
class FourBits:
    """`WeightFormat` of NF4 or FP4: they differ in their table, which lies beside each weight."""

    name: str
    state: str
    """The tensor that holds block sizes and shape, as JSON."""

    def names(self, place: Place) -> tuple[str, ...]:
        codes = place.named(CODES)
        beside = (ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS, self.state)
        return (codes, *(f"{codes}.{suffix}" for suffix in beside))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        codes_name, absmax_name, levels_name, nested_absmax_name, nested_levels_name, state_name = self.names(place)
        codes = source.entry(codes_name)
        if codes is None or codes.dtype != "U8" or place.experts is not None:
            return None
        if source.entry(state_name) is None:
            self._check_for_another(codes_name, source)
            return None
        state = _State.of(state_name, bytes(source.read(state_name)))
        if state.shape != shape:
            raise ShapeMismatch(state_name, state.shape, shape)
        elements = math.prod(shape)
        if codes.nbytes != (elements + 1) // 2:
            raise ShapeMismatch(codes_name, codes.shape, ((elements + 1) // 2, 1))
        blocks = -(-elements // state.block)
        absmax = source.require(absmax_name, codes_name, ("U8",) if state.nested_block else ("F32",))
        expect_shape(absmax_name, absmax, (blocks,), f"{state_name} with blocks of {state.block}")
        expect_shape(levels_name, source.require(levels_name, codes_name, ("F32",)), (16,), "a code of 4 bits")
        used = [codes_name, absmax_name, levels_name]
        if state.nested_block:
            nested = source.require(nested_absmax_name, codes_name, ("F32",))
            outer = -(-blocks // state.nested_block)
            expect_shape(nested_absmax_name, nested, (outer,), f"{state_name} with blocks of {state.nested_block}")
            table = source.require(nested_levels_name, codes_name, ("F32",))
            expect_shape(nested_levels_name, table, (256,), "a code of 8 bits")
            used += [nested_absmax_name, nested_levels_name]
        parts = [
            TensorPart.whole(name, source.require(name, codes_name, ("U8", "F32"))) for name in (*used, state_name)
        ]
        grouping = None
        if len(shape) == 2 and shape[1] % state.block == 0:
            grouping = Grouping(4, state.block, levels=tuple(map(float, source.read(levels_name))))
        return StoredWeight(self.name, shape, tuple(parts), grouping)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        import numpy as np

        codes, absmax, levels, state = self._read(stored, arrays)
        values = np.zeros(len(absmax) * state.block, np.float32)
        values[: len(codes)] = levels[codes]
        values.reshape(-1, state.block)[:] *= absmax[:, None]
        return values[: len(codes)].reshape(stored.shape)

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        if stored.grouping is None:
            return None
        codes, absmax, _, _ = self._read(stored, arrays)
        return GroupedCodes(stored.grouping, codes.reshape(stored.shape), absmax.reshape(stored.shape[0], -1))

    def _check_for_another(self, name: str, source: Source) -> None:
        """Raise `BadTensor` where a weight of one of these formats has the state of neither."""
        if source.entry(f"{name}.{ABSMAX}") is not None and not any(source.entry(f"{name}.{s}") for s in STATES):
            raise BadTensor(name, f"none of {', '.join(f'{name}.{state}' for state in STATES)} beside it")

    def _read(
        self, stored: StoredWeight, arrays: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, _State]:
        """Codes uint8 [N * K], absmax float32 [blocks], levels float32 [16], and what JSON says."""
        import numpy as np

        packed, absmax, levels, *nested, state_bytes = arrays
        state = _State.of(stored.parts[-1].name, bytes(state_bytes))
        codes = np.empty((packed.size, 2), np.uint8)
        np.right_shift(packed.reshape(-1), 4, out=codes[:, 0])
        np.bitwise_and(packed.reshape(-1), 15, out=codes[:, 1])
        if nested:
            nested_absmax, nested_levels = nested
            absmax = nested_levels[absmax] * nested_absmax.repeat(state.nested_block)[: len(absmax)]
            absmax += np.float32(state.nested_offset)
        return codes.reshape(-1)[: math.prod(stored.shape)], absmax, levels, state


@dataclass(frozen=True, slots=True)
class _State:
    """What bitsandbytes writes as JSON beside a weight."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    """0: absmax is not quantised."""
    nested_offset: float

    @staticmethod
    def of(name: str, text: bytes) -> _State:
        """Raises `BadTensor`."""
        try:
            fields: dict[str, Any] = json.loads(text)
            state = _State(
                tuple(map(int, fields["shape"])),
                int(fields["blocksize"]),
                int(fields.get("nested_blocksize") or 0),
                float(fields.get("nested_offset") or 0.0),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadTensor(name, f"no JSON with shape and blocksize ({error!r})") from None
        if state.block < 1 or state.nested_block < 0:
            raise BadTensor(name, f"blocks of {state.block} and {state.nested_block}")
        return state


@dataclass(frozen=True, slots=True)
class EightBits:
    """`WeightFormat` of LLM.int8(): a scale a row."""

    name: str

    def names(self, place: Place) -> tuple[str, ...]:
        return tuple(place.named(suffix) for suffix in (CODES, "SCB", "weight_format"))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        codes_name, scales_name, order_name = self.names(place)
        codes, scales = source.entry(codes_name), source.entry(scales_name)
        if codes is None or scales is None or codes.dtype != "I8" or place.experts is not None:
            return None
        if codes.shape != shape or len(shape) != 2:
            raise ShapeMismatch(codes_name, codes.shape, shape)
        source.require(scales_name, codes_name, ("F32",))
        expect_shape(scales_name, scales, (shape[0],), f"{codes_name} {list(shape)}")
        if source.entry(order_name) is not None and (order := source.read(order_name)).any():
            raise BadTensor(order_name, f"{order.tolist()}: an order for one kind of card; {ROW_MAJOR} (rows) is read")
        parts = (TensorPart.whole(codes_name, codes), TensorPart.whole(scales_name, scales))
        return StoredWeight(self.name, shape, parts, Grouping(8, shape[1]))

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        import numpy as np

        codes, scales = arrays
        values = codes.astype(np.float32)
        values *= scales[:, None]
        values *= np.float32(1 / 127)
        return values

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        import numpy as np

        assert stored.grouping is not None
        codes, scales = arrays
        scale = (scales * np.float32(1 / 127)).reshape(-1, 1)
        return GroupedCodes(stored.grouping, codes.view(np.uint8) ^ np.uint8(MIDDLE[8]), scale)


NF4: Final = FourBits("bitsandbytes-nf4", STATES[0])
FP4: Final = FourBits("bitsandbytes-fp4", STATES[1])
INT8: Final = EightBits("bitsandbytes-int8")
