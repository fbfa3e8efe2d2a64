"""What is passed to the CUDA driver: to a library whose functions have the types of cuda.h, and to a card."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import echo_expert as echo
import pytest
import torch

from moe_ray.core import ExpertCall, ReplicaInfo
from moe_ray.errors import MailboxRefused
from moe_ray.model.compute.compute import has_cuda
from moe_ray.transport import connect
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.mailbox.cuda_driver import HANDLE_BYTES, CudaDriver
from moe_ray.transport.mailbox.open_card import card_mailboxes, mailbox_server
from moe_ray.transport.mailbox.trunk_end import CardMailboxes

LIBRARY = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct { char reserved[64]; } CUipcMemHandle;
typedef unsigned long long CUdeviceptr;
static int device = -1; static void *current; static CUdeviceptr last; static unsigned flags;
int cuInit(unsigned f) { return f ? 1 : 0; }
int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_ODD"; return 0;
}
int cuDeviceGet(int *out, int ordinal) { *out = device = 10 + ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int which) {
  *context = (void *)0x7000000000000000; return which == device ? 0 : 1;
}
int cuCtxSetCurrent(void *context) { current = context; return 0; }
static int here(void) { return current == (void *)0x7000000000000000 ? 0 : 201; }
int cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
  if (size > ((size_t)1 << 40)) return 2;
  *out = 0x7f0000000000ull + size; return here();
}
int cuMemFree_v2(CUdeviceptr at) { last = at; return here(); }
int cuIpcGetMemHandle(CUipcMemHandle *out, CUdeviceptr at) {
  for (int i = 0; i < 64; i++) out->reserved[i] = (char)i;  /* a zero among them */
  memcpy(out->reserved + 8, &at, 8); return here();
}
int cuIpcOpenMemHandle_v2(CUdeviceptr *out, CUipcMemHandle handle, unsigned f) {
  for (int i = 16; i < 64; i++) if (handle.reserved[i] != (char)i) return 1;
  memcpy(out, handle.reserved + 8, 8); *out += 5; return f == 1 ? here() : 1;
}
int cuIpcCloseMemHandle(CUdeviceptr at) { last = at; return here(); }
int cuMemHostRegister_v2(void *at, size_t size, unsigned f) {
  last = (CUdeviceptr)at + size; return f == 3 ? here() : 1;
}
int cuMemHostUnregister(void *at) { last = (CUdeviceptr)at; return here(); }
int cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *at, unsigned f) { *out = (CUdeviceptr)at + 7; return f; }
int cuStreamWaitValue32_v2(void *stream, CUdeviceptr at, uint32_t value, unsigned f) {
  last = (CUdeviceptr)stream + at + value; flags = f; return here();
}
int cuStreamWriteValue32_v2(void *stream, CUdeviceptr at, uint32_t value, unsigned f) {
  last = (CUdeviceptr)stream + at + 2ull * value; flags = f; return here();
}
unsigned long long last_argument(void) { return last; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("driver")
    (directory / "driver.c").write_text(LIBRARY)
    out = directory / "libcuda-like.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", out, directory / "driver.c"], check=True)
    return out


def test_each_call_gets_what_it_is_declared_with(library: Path) -> None:
    import ctypes

    last = ctypes.CDLL(str(library)).last_argument
    last.restype = ctypes.c_uint64
    driver = CudaDriver(3, str(library))
    address = driver.allocate(4 << 20)
    assert address == 0x7F0000000000 + (4 << 20)
    handle = driver.handle_of(address)
    assert len(handle) == HANDLE_BYTES
    assert driver.open(handle) == address + 5
    driver.close(address + 5)
    assert last() == address + 5
    driver.free(address)
    assert last() == address
    host = 0x7FFF12345000
    assert driver.register(host, 4096) == host + 7
    assert last() == host + 4096
    driver.unregister(host)
    assert last() == host
    driver.wait_value(1 << 45, address, 0xFFFF_FFFF)
    assert last() == (1 << 45) + address + 0xFFFF_FFFF
    driver.write_value(1 << 45, address, 0xFFFF_FFFF)
    assert last() == (1 << 45) + address + 2 * 0xFFFF_FFFF


def test_what_the_driver_refuses_is_named(library: Path) -> None:
    driver = CudaDriver(0, str(library))
    with pytest.raises(MailboxRefused, match="cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.allocate(1 << 41)
    with pytest.raises(MailboxRefused, match="cuIpcOpenMemHandle_v2: CUDA_ERROR_ODD"):
        driver.open(bytes(HANDLE_BYTES))
    with pytest.raises(MailboxRefused, match="a handle of 3 bytes"):
        driver.open(b"abc")
    with pytest.raises(MailboxRefused, match=r"the CUDA driver: .*libcuda-of-nowhere"):
        CudaDriver(0, "libcuda-of-nowhere.so")


def test_a_process_without_a_card_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    assert card_mailboxes("cpu") is None
    assert mailbox_server(echo.behave, "cpu", LinkOptions()) is None
    (said,) = caplog.messages
    assert "this process computes on cpu" in said


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_on_a_card_rows_go_through_its_memory(expert_process: Callable[..., tuple[ReplicaInfo, int]]) -> None:
    from moe_ray.transport.mailbox.cuda_memory import CudaMemory

    mailboxes = CardMailboxes(CudaMemory())
    info, _ = expert_process("cuda", echo.TOKEN)
    info = replace(info, hidden_size=256)
    link = connect("socket", info, LinkOptions(token=echo.TOKEN, mailboxes=mailboxes))
    assert link.on_card
    for turn in range(100):
        rows, weights = torch.randn(1 + turn, 256, device="cuda"), torch.rand(1 + turn, device="cuda")
        calls = [ExpertCall(0, echo.ECHO, rows * i, weights) for i in range(1, 6)]
        replies = [link.send(call) for call in calls]
        for call, reply in zip(calls, replies, strict=True):
            got = reply.result(20).rows
            assert got.device.type == "cuda"
            assert torch.equal(got, echo.weighted(call))
    link.close()
