"""`wire.py`: whole messages survive, malformed ones are refused by the name of the field; and moe_ray/pb is fresh."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ray.core import ExpertCall, ExpertReply, ReplicaLoad
from moe_ray.errors import CallRefused, ExpertFailed, InvalidCall, ProtocolError, ReplicaBusy, WrongAnswer
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire

ROOT = Path(__file__).parents[2]


def call_message() -> pb.ExpertCall:
    return wire.pack_call(ExpertCall(7, 3, torch.arange(6.0).view(2, 3), torch.tensor([0.25, 0.75]), call_id=9))


def reply_message() -> pb.ExpertReply:
    return wire.pack_reply(ExpertReply(9, torch.arange(6.0).view(2, 3), ReplicaLoad(5, 6, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_through_bytes(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 5).to(dtype)
    weights = torch.rand(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent = wire.pack_call(ExpertCall(7, 3, rows, weights, call_id=9)).SerializeToString()
        call = wire.unpack_call(pb.ExpertCall.FromString(sent))
        back = wire.pack_reply(ExpertReply(9, call.rows, ReplicaLoad(5, 6, 7))).SerializeToString()
        reply = wire.unpack_reply(pb.ExpertReply.FromString(back))
    assert (call.layer, call.expert, call.call_id) == (7, 3, 9)
    assert torch.equal(call.rows, rows)
    assert torch.equal(call.weights, weights)
    assert call.rows.dtype == reply.rows.dtype == dtype
    assert torch.equal(reply.rows, rows)
    assert (reply.call_id, reply.load) == (9, ReplicaLoad(5, 6, 7))
    reply.rows[0, 0] = 1
    assert torch.equal(wire.unpack_reply(pb.ExpertReply.FromString(back)).rows, rows)  # a copy of its own


def test_rows_are_little_endian_and_row_major() -> None:
    message = call_message()
    assert message.rows == np.arange(6, dtype="<f4").tobytes()
    assert message.weights == np.array([0.25, 0.75], dtype="<f4").tobytes()


SPOILS = [
    ("header.dtype", lambda m: setattr(m.header, "dtype", pb.DTYPE_UNSPECIFIED)),
    ("header.dtype", lambda m: setattr(m.header, "dtype", 77)),
    ("header.dtype", lambda m: m.ClearField("header")),
    ("rows has 24 bytes, expected 12", lambda m: setattr(m.header, "dtype", pb.FLOAT16)),
    ("header.num_rows", lambda m: setattr(m.header, "num_rows", 0)),
    ("header.hidden_size", lambda m: setattr(m.header, "hidden_size", 0)),
    ("rows has 24 bytes, expected 36", lambda m: setattr(m.header, "num_rows", 3)),
    ("rows has 24 bytes, expected 32", lambda m: setattr(m.header, "hidden_size", 4)),
    ("rows has 23 bytes", lambda m: setattr(m, "rows", m.rows[:-1])),
    ("rows has 25 bytes", lambda m: setattr(m, "rows", m.rows + b"\0")),
    ("rows has 0 bytes", lambda m: m.ClearField("rows")),
    ("header.num_rows x header.hidden_size", lambda m: setattr(m.header, "num_rows", 2**32 - 1)),
    ("header.num_rows x header.hidden_size", lambda m: setattr(m.header, "hidden_size", 2**32 - 1)),
]


@pytest.mark.parametrize(("says", "spoil"), SPOILS)
def test_malformed_messages_name_the_field(says: str, spoil: Callable[[object], None]) -> None:
    call, reply = call_message(), reply_message()
    spoil(call)
    spoil(reply)
    with pytest.raises(ProtocolError, match=says):
        wire.unpack_call(call)
    with pytest.raises(ProtocolError, match=says):
        wire.unpack_reply(reply)


@pytest.mark.parametrize("weights", [b"", b"\0" * 4, b"\0" * 7, b"\0" * 12])
def test_weights_of_the_wrong_length(weights: bytes) -> None:
    message = call_message()
    message.weights = weights
    with pytest.raises(ProtocolError, match=f"weights has {len(weights)} bytes, expected 8"):
        wire.unpack_call(message)


def test_a_size_that_no_message_may_have_is_refused_before_it_is_copied() -> None:
    rows = torch.empty(1, dtype=torch.float32).expand(2**14, 2**15)  # 2 GiB that take 4 bytes
    with pytest.raises(InvalidCall, match="rows has 2147483648 bytes"):
        wire.pack_call(ExpertCall(0, 0, rows, torch.ones(2**14)))
    with pytest.raises(InvalidCall, match="layer is -1"):
        wire.pack_call(ExpertCall(-1, 0, torch.ones(1, 1), torch.ones(1)))


def test_errors_travel_as_a_status() -> None:
    failed = wire.pack_error(4, ExpertFailed("no memory"))
    refused = wire.pack_error(5, CallRefused("no such key"))
    busy = wire.pack_error(6, ReplicaBusy("64 rows are queued"))
    assert (failed.header.call_id, failed.header.status) == (4, pb.FAILED)
    assert (refused.header.call_id, refused.header.status) == (5, pb.REFUSED)
    with pytest.raises(ExpertFailed, match=r"^no memory$"):
        wire.unpack_reply(failed)
    with pytest.raises(CallRefused, match="call refused: no such key"):
        wire.unpack_reply(refused)
    with pytest.raises(ReplicaBusy, match="busy: 64 rows are queued"):
        wire.unpack_reply(busy)
    failed.header.status = 9  # type: ignore[assignment]
    with pytest.raises(WrongAnswer, match=r"header\.status is 9"):
        wire.unpack_reply(failed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numpy_round_trip(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 5).to(dtype)
    name, array = wire.to_numpy(rows)
    array = array.copy()
    array.flags.writeable = False  # as Ray hands them out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = wire.from_numpy(name, array, "rows")
    assert back.dtype == dtype
    assert torch.equal(back, rows)
    back[0, 0] = 1  # a copy of its own


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("float64", np.ones((2, 2))),
        ("float32", np.ones((2, 2))),
        ("bfloat16", np.ones((2, 2), np.float32)),
        ("float32", np.ones((0, 2), np.float32)),
        ("float32", np.ones(2, np.float32)),
        ("float32", "rows"),
    ],
)
def test_malformed_numpy(name: str, array: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="rows"):
        wire.from_numpy(name, array, "rows")


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, str(ROOT / "protos" / "moe_ray.proto")], check=True)
    for name in ("moe_ray_pb2.py", "moe_ray_pb2.pyi", "moe_ray_pb2_grpc.py"):
        fresh = (tmp_path / name).read_text()
        fresh = fresh.replace("\nimport moe_ray_pb2 as", "\nfrom moe_ray.pb import moe_ray_pb2 as")
        assert (ROOT / "moe_ray" / "pb" / name).read_text() == fresh, f"moe_ray/pb/{name} is stale: run `make protos`"
