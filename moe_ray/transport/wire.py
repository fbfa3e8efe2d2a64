"""Pure functions between `ExpertCall`/`ExpertReply` and their messages. Whatever is malformed raises `ProtocolError`.

Tensors travel as raw bytes, row-major, little-endian (as on every CPU that torch runs on). Sending copies a tensor once
(twice from a CUDA device); receiving copies once, so that received tensors are writable CPU tensors of their own.

torch is imported by the first call, not by opening a port: an expert whose calls all come over native sockets never
needs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from moe_ray.core import ExpertCall, ExpertReply, ReplicaLoad
from moe_ray.errors import (
    AdapterNotHeld,
    CallRefused,
    ExpertFailed,
    InvalidCall,
    ProtocolError,
    ReplicaBusy,
    TransportError,
    WrongAnswer,
)
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport.adapter_runs import check_runs, runs_of

if TYPE_CHECKING:
    import torch

MAX_TENSOR_BYTES = 1 << 30
"""Rows of one message; protobuf itself ends at 2 GiB. 64 Ki rows of a Mixtral in bf16 are half of it."""
_MAX_UINT32, _MAX_UINT64 = 2**32 - 1, 2**64 - 1

_CODES: Mapping[str, pb.DType] = {"float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16}
_NAMES = {code: name for name, code in _CODES.items()}
_ITEM_BYTES: Mapping[int, int] = {pb.FLOAT32: 4, pb.BFLOAT16: 2, pb.FLOAT16: 2}


@cache
def _torch_dtypes() -> Mapping[torch.dtype, str]:
    import torch

    return {getattr(torch, name): name for name in _CODES}


@cache
def _torch_dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, its in _torch_dtypes().items() if its == name)


def check_rows(rows: torch.Tensor, field: str) -> None:
    """Raise `InvalidCall` naming `field` unless `rows` is a [T, D] tensor that a message can carry."""
    if rows.dtype not in _torch_dtypes():
        raise InvalidCall(f"{field} is {rows.dtype}, not one of {', '.join(_CODES)}")
    if rows.dim() != 2 or 0 in rows.shape:
        raise InvalidCall(f"{field} has shape {list(rows.shape)}, expected [T, D] with T and D at least 1")
    if rows.numel() * rows.itemsize > MAX_TENSOR_BYTES:
        raise InvalidCall(f"{field} has {rows.numel() * rows.itemsize} bytes, more than {MAX_TENSOR_BYTES}")


def check_call(call: ExpertCall) -> None:
    """Raise `InvalidCall` naming the field unless every carrier can carry `call`."""
    check_rows(call.rows, "rows")
    if call.weights.dtype != _torch_dtype("float32") or call.weights.shape != call.rows.shape[:1]:
        raise InvalidCall(
            f"weights is {call.weights.dtype} {list(call.weights.shape)}, expected torch.float32 [{len(call.rows)}]"
        )
    for name, value, most in (
        ("layer", call.layer, _MAX_UINT32),
        ("expert", call.expert, _MAX_UINT32),
    ):
        if not 0 <= value <= most:
            raise InvalidCall(f"{name} is {value}, expected 0..{most}")
    check_runs(call.adapters, len(call.rows))


def dtype_code(rows: torch.Tensor) -> int:
    """The dtype of `rows` as the wire numbers it."""
    return int(_CODES[_torch_dtypes()[rows.dtype]])


def dtype_name(code: int) -> str:
    """The name of a dtype on the wire."""
    return _NAMES.get(code, f"dtype {code}")  # type: ignore[call-overload]


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of `tensor` as uint8 [n]; no copy if it is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)


def buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to send from or to receive into. It must outlive them."""
    # By address: the way over numpy takes five times as long, twice for every call.
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def sendable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a contiguous copy of it on the CPU."""
    return tensor if tensor.device.type == "cpu" and tensor.is_contiguous() else tensor.detach().cpu().contiguous()


def call_header(call: ExpertCall) -> pb.ExpertCallHeader:
    """Describe a call that was checked."""
    num_rows, hidden_size = call.rows.shape
    return pb.ExpertCallHeader(
        call_id=call.call_id,
        layer=call.layer,
        expert=call.expert,
        num_rows=num_rows,
        hidden_size=hidden_size,
        dtype=_CODES[_torch_dtypes()[call.rows.dtype]],
        adapter_ids=[run.adapter_id for run in call.adapters],
        adapter_rows=[run.count for run in call.adapters],
    )


def pack_call(call: ExpertCall) -> pb.ExpertCall:
    """Check `call` and copy it into a message."""
    check_call(call)
    return pb.ExpertCall(header=call_header(call), rows=raw(call.rows).tobytes(), weights=raw(call.weights).tobytes())


def unpack_call(message: pb.ExpertCall) -> ExpertCall:
    """Check `message` and copy it into tensors."""
    return read_call(message.header, message.rows, message.weights)


def read_call(header: pb.ExpertCallHeader, rows: bytes, weights: bytes) -> ExpertCall:
    """Check a header against its tensors' bytes, which are copied."""
    tensor = _read_rows(header, rows)
    if len(weights) != 4 * header.num_rows:
        raise ProtocolError(
            f"weights has {len(weights)} bytes, expected {4 * header.num_rows} for {header.num_rows} rows"
        )
    import torch

    return ExpertCall(
        layer=header.layer,
        expert=header.expert,
        rows=tensor,
        weights=torch.frombuffer(bytearray(weights), dtype=torch.float32),
        call_id=header.call_id,
        adapters=runs_of(header),
    )


def reply_header(reply: ExpertReply) -> pb.ExpertReplyHeader:
    """Describe a reply that was checked."""
    num_rows, hidden_size = reply.rows.shape
    return pb.ExpertReplyHeader(
        call_id=reply.call_id,
        status=pb.OK,
        num_rows=num_rows,
        hidden_size=hidden_size,
        dtype=_CODES[_torch_dtypes()[reply.rows.dtype]],
        queued_rows=reply.load.queued_rows,
        compute_us=reply.load.compute_us,
        queue_us=reply.load.queue_us,
    )


def pack_reply(reply: ExpertReply) -> pb.ExpertReply:
    """Check `reply` and copy it into a message."""
    check_rows(reply.rows, "rows")
    return pb.ExpertReply(header=reply_header(reply), rows=raw(reply.rows).tobytes())


def status_of(error: TransportError) -> pb.CallStatus:
    """The status of the reply to a call that ended in `error` at the replica."""
    if isinstance(error, ExpertFailed):
        return pb.FAILED
    if isinstance(error, AdapterNotHeld):
        return pb.NO_ADAPTER
    return pb.BUSY if isinstance(error, ReplicaBusy) else pb.REFUSED


def pack_error(call_id: int, error: TransportError) -> pb.ExpertReply:
    """The reply to a call that ended in `error` at the replica."""
    header = pb.ExpertReplyHeader(call_id=call_id, status=status_of(error), error=str(error))
    return pb.ExpertReply(header=header)


def unpack_reply(message: pb.ExpertReply) -> ExpertReply:
    """Check `message` and copy it into tensors."""
    return read_reply(message.header, message.rows)


def read_reply(header: pb.ExpertReplyHeader, rows: bytes) -> ExpertReply:
    """Check a header against its tensor's bytes, which are copied.

    A reply that reports an error raises it, as `error_of` says.
    """
    if header.status != pb.OK:
        raise error_of(header.status, header.error)
    return ExpertReply(call_id=header.call_id, rows=_read_rows(header, rows), load=load_of(header))


def error_of(status: int, message: str) -> TransportError:
    """The error that a reply's status stands for; an unknown status is itself a `WrongAnswer`."""
    if status == pb.FAILED:
        return ExpertFailed(message)
    if status == pb.REFUSED:
        return CallRefused(f"call refused: {message}")
    if status == pb.NO_ADAPTER:
        return AdapterNotHeld(f"call refused: {message}")
    if status == pb.BUSY:
        return ReplicaBusy(f"busy: {message}")
    if status == pb.CANCELLED:
        return WrongAnswer("the replica cancelled a call that the trunk had not cancelled")
    return WrongAnswer(f"header.status is {status}, which is not a CallStatus")


def to_numpy(rows: torch.Tensor) -> tuple[str, np.ndarray]:
    """The dtype's name and `rows` as a numpy array; 16-bit floats as int16, for numpy knows no bfloat16. No copy."""
    import torch

    array = rows.detach().cpu().contiguous()
    bits = array if array.dtype == torch.float32 else array.view(torch.int16)
    return _torch_dtypes()[rows.dtype], bits.numpy()


def from_numpy(dtype: str, array: np.ndarray, field: str) -> torch.Tensor:
    """Check and copy what `to_numpy` made. Raises `ProtocolError` naming `field`."""
    import torch

    if dtype not in _CODES:
        raise ProtocolError(f"{field} is {dtype!r}, not one of {', '.join(_CODES)}")
    expected = np.dtype(np.float32 if dtype == "float32" else np.int16)
    if not isinstance(array, np.ndarray) or array.dtype != expected:
        raise ProtocolError(f"{field} is not a numpy array of {expected}")
    rows = torch.from_numpy(array.copy()).view(_torch_dtype(dtype))
    try:
        check_rows(rows, field)
    except InvalidCall as error:
        raise ProtocolError(str(error)) from None
    return rows


def weights_from_numpy(array: np.ndarray) -> torch.Tensor:
    """A copy of routing weights that came as an array; `check_call` says whether they are what they should be."""
    import torch

    return torch.from_numpy(array.copy())


def empty_rows(header: pb.ExpertCallHeader | pb.ExpertReplyHeader) -> torch.Tensor:
    """The tensor [T, D] that a header announces, for its bytes to be received into."""
    import torch

    shape, dtype = form_of(header)
    return torch.empty(shape, dtype=dtype)


def form_of(header: pb.ExpertCallHeader | pb.ExpertReplyHeader) -> tuple[tuple[int, int], torch.dtype]:
    """The shape [T, D] and dtype of the rows that a header announces. Raises `ProtocolError`."""
    dtype, num_rows, hidden_size = header.dtype, header.num_rows, header.hidden_size
    if dtype not in _NAMES:
        raise ProtocolError(f"header.dtype is {dtype}, not one of {', '.join(_CODES)}")
    if num_rows < 1:
        raise ProtocolError("header.num_rows is 0, expected at least 1")
    if hidden_size < 1:
        raise ProtocolError("header.hidden_size is 0, expected at least 1")
    size = num_rows * hidden_size * _ITEM_BYTES[dtype]
    if size > MAX_TENSOR_BYTES:
        raise ProtocolError(
            f"header.num_rows x header.hidden_size is {num_rows} x {hidden_size}: {size} bytes, "
            f"more than {MAX_TENSOR_BYTES}"
        )
    return (num_rows, hidden_size), _torch_dtype(_NAMES[dtype])


def empty_weights(num_rows: int) -> torch.Tensor:
    """The tensor float32 [T] for the routing weights of as many rows."""
    import torch

    return torch.empty(num_rows, dtype=torch.float32)


def load_of(header: pb.ExpertReplyHeader) -> ReplicaLoad:
    """The replica's load when the reply left."""
    return ReplicaLoad(header.queued_rows, header.compute_us, header.queue_us)


def _read_rows(header: pb.ExpertCallHeader | pb.ExpertReplyHeader, data: bytes) -> torch.Tensor:
    rows = empty_rows(header)
    if len(data) != rows.nbytes:
        raise ProtocolError(f"rows has {len(data)} bytes, expected {rows.nbytes} for {rows.dtype} {list(rows.shape)}")
    # The one copy. A tensor over the message's own bytes would be read-only behind torch's back.
    raw(rows)[:] = np.frombuffer(data, dtype=np.uint8)
    return rows
