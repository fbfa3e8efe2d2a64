"""The few calls of the CUDA driver that mailboxes need, by its C interface, which is the same from CUDA 11.7 on.

torch has none of them: it shares tensors, but no memory of its own choosing, and knows no flags.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Final

from moe_ray.errors import MailboxRefused

DRIVER: Final = "libcuda.so.1"
HANDLE_BYTES: Final = 64
_PORTABLE_AND_MAPPED: Final = 0x01 | 0x02  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP
_LAZY_PEER_ACCESS: Final = 0x1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag that there is
_GREATER_OR_EQUAL: Final = 0x0  # CU_STREAM_WAIT_VALUE_GEQ: cyclic
_WITH_BARRIER: Final = 0x0  # CU_STREAM_WRITE_VALUE_DEFAULT: what was begun before is seen before


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle of cuda.h. It is passed by value."""

    _fields_ = (("reserved", c_char * HANDLE_BYTES),)


_SIGNATURES: Final = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuStreamWaitValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint),
    "cuStreamWriteValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint),
}


class CudaDriver:
    """The driver on one device, in its primary context, which is torch's too. Callable from any thread.

    Each method raises `MailboxRefused` naming the call and the driver's error.
    """

    def __init__(self, device: int, library: str = DRIVER) -> None:
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = c_int, arguments
        except (OSError, AttributeError) as error:
            raise MailboxRefused(f"the CUDA driver: {error}") from None
        self._call("cuInit", 0)
        number, self._context = c_int(), c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)

    def allocate(self, nbytes: int) -> int:
        """The address of new device memory."""
        address = c_uint64()
        self._here("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        return address.value

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        self._here("cuMemFree_v2", address)

    def handle_of(self, address: int) -> bytes:
        """By which other processes open memory of `allocate`."""
        handle = IpcHandle()
        self._here("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        """The address here of memory that another process has allocated."""
        if len(handle) != HANDLE_BYTES:
            raise MailboxRefused(f"a handle of {len(handle)} bytes, expected {HANDLE_BYTES}")
        address = c_uint64()
        self._here(
            "cuIpcOpenMemHandle_v2", ctypes.byref(address), IpcHandle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
        )
        return address.value

    def close(self, address: int) -> None:
        """Let memory of `open` go."""
        self._here("cuIpcCloseMemHandle", address)

    def register(self, host: int, nbytes: int) -> int:
        """The device's address of the host's memory at `host`, whole pages of it."""
        self._here("cuMemHostRegister_v2", host, nbytes, _PORTABLE_AND_MAPPED)
        address = c_uint64()
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), host, 0)
        return address.value

    def unregister(self, host: int) -> None:
        """The device sees it no more."""
        self._here("cuMemHostUnregister", host)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Have a stream wait until the word at `address` is at `value` or later, in cyclic order."""
        self._here("cuStreamWaitValue32_v2", stream, address, value, _GREATER_OR_EQUAL)

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Have a stream write the word at `address` behind all that it was given before."""
        self._here("cuStreamWriteValue32_v2", stream, address, value, _WITH_BARRIER)

    def _here(self, name: str, *arguments: object) -> None:
        """Call in the device's context: threads that have not used torch's CUDA have none."""
        self._call("cuCtxSetCurrent", self._context)
        self._call(name, *arguments)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            said = c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(said))
            raise MailboxRefused(f"{name}: {(said.value or str(code).encode()).decode()}")
