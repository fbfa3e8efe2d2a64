"""M1, the model that the benches measure: a random Mixtral made from a seed, so that every machine has the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_ray.config import Config
from moe_ray.convert.demo import Progress, cached_model
from moe_ray.errors import CheckpointError
from moe_ray.hub import resolve_model

if TYPE_CHECKING:
    import torch

    from moe_ray.model.families import Weight

RECIPE_VERSION = 1
"""Raise it when the code changes what the same parameters make; caches of other versions are made anew."""
MODEL_NAME = "bench-m1"
DISK_MARGIN_BYTES = 100_000_000

BOS, EOS = 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")
WORD_START = "▁"
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make. The defaults are M1: 0.78 B parameters, 1.6 GB.

    Embeddings are large beside what a layer adds, as in a trained network: were everything drawn at one scale, the
    layers would amplify rounding until two right engines part at the first token. The other weights are large enough
    for the context to matter.
    """

    hidden_size: int = 1024
    intermediate_size: int = 3584
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    vocab_size: int = 32_000
    max_position_embeddings: int = 4096
    weight_std: float = 0.03
    embedding_std: float = 1.0
    seed: int = 0
    shard_bytes: int = 400_000_000


M1 = Recipe()
M1_LONG = Recipe(max_position_embeddings=32_768)
"""M1 with positions for long contexts: the same weights."""
SMALL = Recipe(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4096,
)
"""What starts and answers quickly, where it is not the computing that is measured."""
_NAMES = {M1: MODEL_NAME, M1_LONG: "bench-m1-long", SMALL: "bench-small"}


def resolve_bench_model(model: str | None, config: Config, progress: Progress) -> Path:
    """Directory of the model to measure: M1 where none is named, else whatever `--model` means everywhere."""
    if model is None:
        return bench_model(config.cache_dir, progress)
    return resolve_model(config.model_copy(update={"model": config.model.model_copy(update={"path": model})}), progress)


def bench_model(cache_dir: Path, progress: Progress, recipe: Recipe = M1) -> Path:
    """Directory of a model under `cache_dir`, made first where it is absent or damaged (M1: 20 s, 1.6 GB of disk).

    It appears whole or not at all, and a second process waits for the first. Raises `CheckpointError`.
    """
    key = hashlib.sha256(json.dumps([RECIPE_VERSION, asdict(recipe)]).encode()).hexdigest()
    try:
        return cached_model(
            cache_dir.expanduser() / _NAMES[recipe],
            key,
            lambda work, target: make_model(target, recipe, progress),
            progress,
        )
    except OSError as error:
        raise CheckpointError(f"cannot make the bench model in {cache_dir}: {error}") from error


def make_model(directory: Path, recipe: Recipe, progress: Progress) -> None:
    """Write a random Mixtral checkpoint into the new `directory`: bfloat16 shards, their index, configs, tokenizer.

    At most one tensor is in memory. Same recipe, same bytes. Raises `CheckpointError` where the disk is too small.
    """
    from moe_ray.convert.shards import ShardWriter
    from moe_ray.model.model_config import ModelConfig
    from moe_ray.model.weights import weights_of_model

    raw = config_json(recipe)
    config = ModelConfig.from_dict(raw)
    weights = list(weights_of_model(config))
    total = sum(2 * weight.numel for weight in weights)
    directory.mkdir(parents=True)
    free = shutil.disk_usage(directory).free
    if free < total + DISK_MARGIN_BYTES:
        raise CheckpointError(f"the bench model needs {total / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free")
    done = 0
    with ShardWriter(directory, "bfloat16", recipe.shard_bytes) as shards:
        for weight in weights:
            progress("bench model", done, total)
            shards.add(weight, random_tensor(weight, recipe))
            done += 2 * weight.numel
    progress("bench model", total, total)
    _write(directory / "config.json", raw)
    _write(directory / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_tokenizer(directory, recipe.vocab_size, recipe.max_position_embeddings)


def random_tensor(weight: Weight, recipe: Recipe) -> torch.Tensor:
    """The values of one weight, from the seed and its name alone, so that the order of writing does not matter."""
    import torch

    from moe_ray.convert.shards import place_of

    if len(weight.shape) == 1:  # the norms
        return torch.ones(weight.shape, dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{recipe.seed} {place_of(weight).named('weight')}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = recipe.embedding_std if weight.role == "embed" else recipe.weight_std
    return torch.randn(weight.shape, generator=generator).mul_(std).bfloat16()


def config_json(recipe: Recipe) -> dict[str, Any]:
    """The checkpoint's config.json; rope_theta and torch_dtype also where transformers 4 and other engines look."""
    shape = asdict(recipe)
    for name in ("weight_std", "embedding_std", "seed", "shard_bytes"):
        del shape[name]
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **shape,
        "head_dim": recipe.hidden_size // recipe.num_attention_heads,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "initializer_range": recipe.weight_std,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def write_tokenizer(directory: Path, vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json: Llama's layout (BPE over ▁words, byte fallback), made-up words.

    The layout is the one that peers convert Mixtral checkpoints by. Nothing is trained: the words are syllables.
    """
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    pieces, merges = vocabulary(vocab_size)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_START), normalizers.Replace(" ", WORD_START)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    _write(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **named, "model_max_length": max_length},
    )


def vocabulary(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """`size` pieces in the order of their ids, and the merges that make them: what comes first is merged first.

    Special tokens, the 256 bytes, ▁ and the printable characters; then syllables (consonant, vowel), pairs of them,
    and words of one, two and three syllables. Raises `ValueError` on a size that is too small or too large.
    """
    base = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), WORD_START, *map(chr, range(0x21, 0x7F))]
    wanted = size - len(base)
    merges = list(itertools.islice(_merges(), max(wanted, 0)))
    if len(merges) != wanted:
        raise ValueError(f"no vocabulary of {size} pieces")
    return base + [left + right for left, right in merges], merges


def _merges() -> Iterator[tuple[str, str]]:
    syllables = [c + v for c, v in itertools.product(CONSONANTS, VOWELS)]
    yield from itertools.product(CONSONANTS, VOWELS)
    yield from itertools.product(syllables, syllables)
    yield from ((WORD_START, syllable) for syllable in syllables)
    pairs = [first + second for first, second in itertools.product(syllables, syllables)]
    yield from ((WORD_START, pair) for pair in pairs)
    yield from itertools.product((WORD_START + pair for pair in pairs), syllables)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
