"""A checkpoint of a config.json alone, for measuring: its tensors are stretches of one file of random bytes.

What computes with it takes as long, and as much memory, as with real weights; what it says means nothing. The file is
not much larger than the largest tensor: in its header tensors overlap, which safetensors' own reader refuses and ours
has no reason to.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from moe_ray.convert.directories import make_once
from moe_ray.convert.recipe import Progress, no_progress
from moe_ray.errors import CheckpointError
from moe_ray.model.families import Layout, Role, Weight
from moe_ray.model.foreign import CONFIG, PARAMS, SINGLE
from moe_ray.model.formats import FLOATS, Place, Quantization, gptq
from moe_ray.model.formats.held import QUANTISED_ROLES
from moe_ray.model.formats.packing import WORD, words_of
from moe_ray.model.json_files import read_json_object
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.safetensors_file import DTYPES, numpy_dtype
from moe_ray.model.tensor_file import ALIGNMENT
from moe_ray.model.weights import matrices_of_expert, weights_of_model

if TYPE_CHECKING:
    import numpy as np

FOLDER: Final = "dummy"
"""Of the cache."""
VERSION: Final = 1
"""Of what is written; another one is another directory."""
SLACK: Final = 32 << 20
"""Bytes of the random stretch beyond the largest tensor: tensors begin anywhere in it, so that few are equal."""
BLOCK: Final = 4_194_301
"""Random numbers that are drawn once and repeated: a prime, so that rows of a matrix differ."""
STD: Final = 0.02
"""Of weights, as initialised: transformers' `initializer_range`."""
CODED: Final[frozenset[Role]] = QUANTISED_ROLES - {"head"}
"""What GPTQ's checkpoints hold as codes."""
SUFFIXES: Final = (".json", ".jinja", ".model", ".txt")
"""Of the files beside config.json that are linked."""
DISK_MARGIN: Final = 64 << 20


Content = Literal["random", "ones", "zeros", "scales", "middles"]
"""Of a stretch of the file. random: numbers as weights are initialised, or words of codes; scales: of codes; middles:
zero points of codes that are as often below as above zero."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    content: Content
    dtype: str
    """In safetensors' words."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype][1] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive bytes of the file, of which every tensor of one content and dtype is a part."""

    content: Content
    dtype: str
    start: int
    """Offset of its first byte behind the header."""
    nbytes: int

    def begin(self, tensor: _Tensor) -> int:
        """Where behind the header the tensor's bytes begin: by its name, anywhere where it has room."""
        room = (self.nbytes - tensor.nbytes) // ALIGNMENT
        digest = hashlib.sha256(tensor.name.encode()).digest()
        return self.start + int.from_bytes(digest[:8], "little") % (room + 1) * ALIGNMENT


def dummy_checkpoint(where: Path, cache_dir: Path, progress: Progress = no_progress) -> Path:
    """A checkpoint's directory that stands for `where`, a directory or its config.json; weights there are not read.

    Made once under `cache_dir`, with links to the small files beside config.json: tokenizer, templates. Matrices are
    floats as config.json says, or 4- or 8-bit codes where its `quantization_config` is of GPTQ. Raises
    `CheckpointError` for other methods, and where the directory cannot be made.
    """
    alone = where.is_file()
    directory = where.parent if alone else where
    config = ModelConfig.from_dict(read_json_object(where), str(where)) if alone else ModelConfig.load(directory)
    beside = [] if alone else sorted(path for path in directory.iterdir() if _is_kept(path))
    raw = dict(config.raw)
    identity = json.dumps([VERSION, str(where.absolute()), [path.name for path in beside], raw], sort_keys=True)
    target = cache_dir.expanduser() / FOLDER / f"{directory.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    tensors = list(_tensors(config, str(where)))

    def build(work: Path) -> None:
        for path in beside:
            (work / path.name).symlink_to(path.absolute())
        (work / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        _write(work / SINGLE, tensors, config, progress)

    try:
        make_once(target, SINGLE, build, progress)
    except OSError as error:
        raise CheckpointError(f"{where}: random weights cannot be made in {target} ({error})") from error
    return target


def _is_kept(path: Path) -> bool:
    """Whether a file beside config.json is small: neither weights nor an index of them."""
    return path.is_file() and path.name not in (CONFIG, PARAMS) and path.suffix in SUFFIXES and "index" not in path.name


def _tensors(config: ModelConfig, where: str) -> Iterator[_Tensor]:
    """Every tensor of such a checkpoint, once. Raises `CheckpointError`."""
    quantization, known = config.quantization, set[str]()
    if quantization is not None and quantization.method != "gptq":
        raise CheckpointError(
            f"{where}: dummy weights are floats, or codes as GPTQ stores them; its quantization_config is of "
            f"{quantization.method}"
        )
    if config.dtype not in FLOATS:
        raise CheckpointError(f"{where}: dtype {config.dtype!r}, supported: {', '.join(FLOATS)}")
    layout = _layout(config)
    for weight in weights_of_model(config):
        place = layout.place(weight, config.num_local_experts)
        if quantization is not None and weight.role in CODED:
            made = _codes(config, quantization, weight, place, where)
        else:
            made = [_floats(config, weight, place)]
        for tensor in made:
            if tensor.name not in known:  # a stack's is named by each of its parts
                known.add(tensor.name)
                yield tensor


def _layout(config: ModelConfig) -> Layout:
    """The family's first layout where each expert has tensors of its own; its first one where none is so."""
    probe = matrices_of_expert(config, config.mixture_layers[0], 0)[0]
    layouts = config.family.layouts
    apart = [each for each in layouts if each.place(probe, config.num_local_experts).experts is None]
    return (*apart, *layouts)[0]


def _floats(config: ModelConfig, weight: Weight, place: Place) -> _Tensor:
    whole = place.whole(weight.shape)
    if place.transposed:
        whole = (whole[0], *whole[:0:-1])
    content: Content = "random"
    if len(weight.shape) == 1:
        content = "ones" if "norm" in weight.role and "bias" not in weight.role else "zeros"
    return _Tensor(place.named("weight"), content, FLOATS[config.dtype].stored, whole)


def _codes(config: ModelConfig, quantization: Quantization, weight: Weight, place: Place, where: str) -> list[_Tensor]:
    """GPTQ's tensors of a weight. Raises `CheckpointError`."""
    n, k = weight.shape
    bits, group = _bits(config, where), quantization.group or k
    if place.experts is not None or k % group or n * bits % WORD or k * bits % WORD:
        raise CheckpointError(f"{where}: {place.named('weight')} {[n, k]} has no {bits}-bit codes in groups of {group}")
    return [
        _Tensor(place.named(gptq.CODES), "random", "I32", (words_of(k, bits), n)),
        _Tensor(place.named(gptq.ZEROS), "middles", "I32", (k // group, words_of(n, bits))),
        _Tensor(place.named(gptq.SCALES), "scales", "F16", (k // group, n)),
    ]


def _bits(config: ModelConfig, where: str) -> int:
    bits = (config.raw.get("quantization_config") or {}).get("bits")
    if bits not in (4, 8):
        raise CheckpointError(f"{where}: quantization_config: bits {bits!r}; dummy weights have 4 or 8")
    return int(bits)


def _write(path: Path, tensors: Sequence[_Tensor], config: ModelConfig, progress: Progress) -> None:
    """Write the file. Raises `OSError`, and `CheckpointError` where the disk is too small."""
    stretches = _stretches(tensors)
    header = {
        each.name: {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": [begin := stretches[each.content, each.dtype].begin(each), begin + each.nbytes],
        }
        for each in tensors
    }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    total = sum(each.nbytes for each in stretches.values())
    free = shutil.disk_usage(path.parent).free
    if free < total + DISK_MARGIN:
        raise CheckpointError(f"{path}: random weights need {total / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free")
    bits = 0 if config.quantization is None else _bits(config, str(path))
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stretch in stretches.values():
            block = _block(stretch, bits).view("uint8").data
            for start in range(0, stretch.nbytes, len(block)):
                file.write(block[: stretch.nbytes - start])
                done += min(len(block), stretch.nbytes - start)
                progress("random weights", done, total)


def _stretches(tensors: Iterable[_Tensor]) -> dict[tuple[Content, str], _Stretch]:
    """One for each content and dtype, as long as its largest tensor, and longer where it is random."""
    longest: dict[tuple[Content, str], int] = {}
    for tensor in tensors:
        key = (tensor.content, tensor.dtype)
        longest[key] = max(longest.get(key, 0), tensor.nbytes)
    found, start = dict[tuple[Content, str], _Stretch](), 0
    for (content, dtype), nbytes in longest.items():
        room = -(-nbytes // ALIGNMENT) * ALIGNMENT + (SLACK if content in ("random", "scales") else 0)
        found[content, dtype] = _Stretch(content, dtype, start, room)
        start += room
    return found


def _block(stretch: _Stretch, bits: int) -> np.ndarray:
    """The numbers that the stretch repeats."""
    import numpy as np

    random, count = np.random.default_rng(0), min(BLOCK, stretch.nbytes)
    dtype = numpy_dtype(stretch.dtype)
    if stretch.content == "random" and stretch.dtype == "I32":
        return random.integers(-(2**31), 2**31, count, dtype=np.int32)
    if stretch.content == "random":
        return (STD * random.standard_normal(count, dtype=np.float32)).astype(dtype)
    if stretch.content == "scales":
        spread = math.sqrt((2 ** (2 * bits) - 1) / 12)  # of codes of which each is as likely
        return (STD / spread * random.uniform(0.8, 1.2, count)).astype(dtype)
    if stretch.content == "middles":
        word = sum((2 ** (bits - 1) - 1) << at for at in range(0, WORD, bits))
        return np.full(1024, word, np.uint32).view(dtype)
    return np.full(1024, 1 if stretch.content == "ones" else 0, dtype)
