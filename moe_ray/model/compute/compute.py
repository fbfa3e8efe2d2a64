"""A resolved backend with its kernels loaded: what one process computes with. Imports torch only to ask about CUDA."""

from __future__ import annotations

import logging
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ray.errors import CardDriverUnavailable, ConfigError, KernelsUnavailable
from moe_ray.model.compute.card_driver import driver_library
from moe_ray.model.compute.resolve import Backend, Machine, TritonHere, Wanted, resolve
from moe_ray.model.model_config import ModelConfig
from moe_ray.native import build
from moe_ray.native.kernels import Kernels
from moe_ray.telemetry import cores

if TYPE_CHECKING:
    import torch

    from moe_ray.model.compute.torch.recorders import Recorder
    from moe_ray.model.compute.torch.staging import Staging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compute:
    """How one process holds and computes tensors. Dtype and device by name: native kernels need no torch.

    >>> Compute(Backend("float32"))  # the reference, with one thread
    """

    backend: Backend
    kernels: Kernels | None = None
    """The native kernels with this process's threads, where a part of the backend is native."""
    threads: int = 1
    """Compute threads of the process."""
    recorder: Recorder | None = None
    """Records what is launched again and again; None: nothing is recorded."""
    staging: Staging | None = None
    """What rows go through between a card and the host's memory; None: they are computed where they are."""

    @property
    def dtype(self) -> str:
        return self.backend.dtype

    @property
    def device(self) -> str:
        return self.backend.device

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device)


def open_compute(model: ModelConfig, wanted: Wanted, cache_dir: Path, threads: int | None = None) -> Compute:
    """Resolve the backend for this machine, load (on first use: build) its kernels, and log what was chosen.

    `threads` of native kernels; default: the cores of this process. Raises `ConfigError` when CUDA or native kernels
    are asked for and cannot be had, `CheckpointError` for a dtype that is not supported.
    """
    threads = threads or cores()
    machine = this_machine(wanted)
    backend, kernels = resolve(model, wanted, machine), None
    if backend.native:
        try:
            kernels = Kernels(cache_dir, threads, backend.kernels)
        except KernelsUnavailable as error:
            if wanted.kernels != "auto":
                raise ConfigError(f"model.kernels is {wanted.kernels!r}: {error}") from None
            if wanted.quantize is not None:
                raise ConfigError(f"quantize {wanted.quantize} needs the native kernels: {error}") from None
            backend = backend.on_reference(str(error))
    logger.info("computing %s", backend)
    for note in (*backend.notes, backend.slower_because):
        if note:
            logger.warning(note)
    return Compute(backend, kernels, threads, _recorder(backend), _staging(backend))


def _recorder(backend: Backend) -> Recorder | None:
    if not backend.graphs:
        return None
    from moe_ray.model.compute.torch.recorders import CudaRecorder

    return CudaRecorder()


def _staging(backend: Backend) -> Staging | None:
    if backend.device != "cuda":
        return None
    import torch

    from moe_ray.model.compute.torch.staging import CudaTransfers, Staging

    return Staging(CudaTransfers(torch.device(backend.device)))


def this_machine(wanted: Wanted) -> Machine:
    """What this process may compute on. torch is asked for CUDA only where a card is welcome."""
    cuda = wanted.device != "cpu" and has_cuda()
    return Machine(build.cpu_flags(), cuda, platform.machine(), capability() if cuda else None, triton_here())


def capability() -> tuple[int, int]:
    """Major and minor compute capability of the CUDA device of this process."""
    import torch

    return torch.cuda.get_device_capability()


def triton_here() -> TritonHere:
    """What Triton would do with kernels in this process. It decides when kernels are defined, and so must this."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:  # a folder of that name is none
        return ""
    interprets = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as triton.knobs
    return "interprets" if interprets else "compiles"


@cache
def has_cuda() -> bool:
    """Whether torch can compute on a CUDA device in this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        driver_library()  # without it, torch finds none
    except CardDriverUnavailable:
        return False
    import torch

    return torch.cuda.is_available()


def limit_torch_threads(count: int) -> None:
    """Let torch compute on `count` threads in this process, be it imported already or later."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # read when torch is loaded
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
