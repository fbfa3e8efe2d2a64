"""Reads a Mixtral-format safetensors checkpoint by name, so that every process reads only its own tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.model_config import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPE_BYTES: Final = {"F32": 4, "BF16": 2, "F16": 2}
SAMPLED_ROWS: Final = 8
"""Of each matrix, for its fingerprint."""

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read) of one process."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that the model needs: its name and the shape it must have."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def trunk_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """The tensors of the trunk: embeddings, attention, norms, router gates and head."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield TensorSpec("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield TensorSpec(prefix + "input_layernorm.weight", (c.hidden_size,))
        yield TensorSpec(prefix + "self_attn.q_proj.weight", (q, c.hidden_size))
        yield TensorSpec(prefix + "self_attn.k_proj.weight", (kv, c.hidden_size))
        yield TensorSpec(prefix + "self_attn.v_proj.weight", (kv, c.hidden_size))
        yield TensorSpec(prefix + "self_attn.o_proj.weight", (c.hidden_size, q))
        yield TensorSpec(prefix + "post_attention_layernorm.weight", (c.hidden_size,))
        yield TensorSpec(prefix + "block_sparse_moe.gate.weight", (c.num_local_experts, c.hidden_size))
    yield TensorSpec("model.norm.weight", (c.hidden_size,))
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size))


def expert_specs(config: ModelConfig, layer: int, expert: int) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """w1 (gate), w3 (up) and w2 (down) of one expert in one layer."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
    inner, outer = config.intermediate_size, config.hidden_size
    return (
        TensorSpec(prefix + "w1.weight", (inner, outer)),
        TensorSpec(prefix + "w3.weight", (inner, outer)),
        TensorSpec(prefix + "w2.weight", (outer, inner)),
    )


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint directory. Not thread-safe. `bytes_read` counts what `read` has taken from it."""

    directory: Path
    config: ModelConfig
    files: dict[str, str]
    """Tensor name → file name."""
    bytes_read: int = 0
    _handles: dict[tuple[str, str], object] = field(default_factory=dict)
    _starts: dict[str, dict[str, int]] = field(default_factory=dict)
    """File name → tensor name → offset of its bytes."""

    @staticmethod
    def open(directory: Path) -> Checkpoint:
        """Open `directory`, reading config.json and the index only. Raises `CheckpointError`."""
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: not a directory")
        config = ModelConfig.load(directory)
        if (directory / INDEX).exists():
            files = _read_index(directory / INDEX)  # files are opened when a tensor of theirs is wanted, not before
        elif (directory / SINGLE).exists():
            checkpoint = Checkpoint(directory, config, {})
            files = dict.fromkeys(checkpoint._keys(SINGLE), SINGLE)
        else:
            raise CheckpointError(_nothing_found(directory))
        return Checkpoint(directory, config, files)

    def check(self, specs: Iterator[TensorSpec]) -> int:
        """Check that every tensor of `specs` exists with its shape and a float dtype; return their bytes on disk.

        Reads the files' headers only. Raises `CheckpointError` naming file and tensor.
        """
        return sum(spec.numel * DTYPE_BYTES[self._dtype(spec)] for spec in specs)

    def read(self, spec: TensorSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return one tensor in memory of its own (never a view of the file). Raises `CheckpointError`."""
        from safetensors import SafetensorError

        stored = self._dtype(spec, "pt")
        try:
            tensor = self._handle(self.files[spec.name], "pt").get_tensor(spec.name)  # type: ignore[attr-defined]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._where(spec)}: cannot be read ({error})") from None
        self.bytes_read += spec.numel * DTYPE_BYTES[stored]
        return tensor.to(device=device, dtype=dtype, copy=True)  # type: ignore[no-any-return]

    def read_bfloat16(self, spec: TensorSpec) -> np.ndarray:
        """Return one tensor as bfloat16 (of ml_dtypes), rounded to even. Needs no torch. Raises `CheckpointError`."""
        import ml_dtypes
        import numpy as np

        stored = self._dtype(spec)
        array = np.empty(spec.shape, {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[stored])
        try:
            # Not by `get_tensor`, which waits for the disk with the interpreter's lock held: who loads serves, too.
            with open(self.directory / self.files[spec.name], "rb", buffering=0) as file:
                file.seek(self._start_of(spec))
                left = array.reshape(-1).view(np.uint8).data
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{self._where(spec)}: cannot be read ({error})") from None
        if left:
            raise CheckpointError(f"{self._where(spec)}: the file ended {len(left)} bytes early")
        self.bytes_read += array.nbytes
        return array.astype(ml_dtypes.bfloat16, copy=False)

    def fingerprint(self, specs: Iterable[TensorSpec]) -> bytes:
        """A digest of matrices by their dtype, shape and `SAMPLED_ROWS` rows of each, spread from first to last.

        Equal for copies of one checkpoint wherever they lie; another training's differ in it. Reads those rows only,
        which `bytes_read` does not count. Raises `CheckpointError`.
        """
        import ml_dtypes  # noqa: F401 - tells numpy, and so safetensors, what bfloat16 is
        from safetensors import SafetensorError

        digest = hashlib.blake2b(digest_size=16)
        for spec in specs:
            digest.update(f"{self._dtype(spec)} {spec.shape}".encode())
            last = spec.shape[0] - 1
            try:
                rows = self._handle(self.files[spec.name], "np").get_slice(spec.name)  # type: ignore[attr-defined]
                for row in sorted({last * i // (SAMPLED_ROWS - 1) for i in range(SAMPLED_ROWS)}):
                    digest.update(rows[row : row + 1].tobytes())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._where(spec)}: cannot be read ({error})") from None
        return digest.digest()

    def close(self) -> None:
        """Unmap the files."""
        self._handles.clear()

    def _start_of(self, spec: TensorSpec) -> int:
        """Where a tensor's bytes begin in its file; the file's header was checked."""
        name = self.files[spec.name]
        if name not in self._starts:
            with open(self.directory / name, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            self._starts[name] = {tensor: 8 + size + entry["data_offsets"][0] for tensor, entry in header.items()}
        return self._starts[name][spec.name]

    def _dtype(self, spec: TensorSpec, framework: str = "np") -> str:
        """Check the tensor's header; return its dtype on disk."""
        from safetensors import SafetensorError

        if spec.name not in self.files:
            raise CheckpointError(f"{self.directory}: tensor {spec.name} is missing from the checkpoint")
        if not (self.directory / self.files[spec.name]).is_file():
            raise CheckpointError(f"{self._where(spec)}: the file is named in {INDEX} but missing")
        try:
            file = self._handle(self.files[spec.name], framework, self._where(spec))
            header = file.get_slice(spec.name)  # type: ignore[attr-defined]
        except SafetensorError:
            raise CheckpointError(f"{self._where(spec)}: named in {INDEX} but not in the file") from None
        shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
        if shape != spec.shape:
            raise CheckpointError(f"{self._where(spec)}: shape {list(shape)}, config.json implies {list(spec.shape)}")
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{self._where(spec)}: dtype {dtype}, supported: {', '.join(DTYPE_BYTES)}")
        return dtype

    def _where(self, spec: TensorSpec) -> str:
        return f"{self.directory / self.files[spec.name]}: tensor {spec.name}"

    def _keys(self, file: str) -> list[str]:
        return list(self._handle(file, "np").keys())  # type: ignore[attr-defined]

    def _handle(self, file: str, framework: str, where: str | None = None) -> object:
        from safetensors import SafetensorError, safe_open

        key = (file, framework)
        if key not in self._handles:
            try:
                self._handles[key] = safe_open(str(self.directory / file), framework=framework, device="cpu")
            except (SafetensorError, OSError) as error:
                where = where or str(self.directory / file)
                raise CheckpointError(
                    f"{where}: not a whole safetensors file ({error}); download or copy it again"
                ) from None
        return self._handles[key]


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable weight_map ({error!r})") from None
    if not isinstance(files, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in files.items()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for name in set(files.values()):
        if not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise CheckpointError(f"{path}: weight_map names {name!r}; only *.safetensors files beside it are read")
    return files


def _nothing_found(directory: Path) -> str:
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        return (
            f"{directory / pickles[0]}: pickle checkpoints can run code when read and are refused; convert it to "
            f"safetensors (transformers: model.save_pretrained)"
        )
    return f"{directory}: neither {INDEX} nor {SINGLE} found"
