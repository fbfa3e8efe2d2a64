"""A small model whose text can be held to a grammar, and one process that tries grammars out for all tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from constrained import EOS, Rig

from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.trunk import Trunk
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.vocabulary import token_bytes


@pytest.fixture(scope="session")
def rig(readable_model: Path) -> Iterator[Rig]:
    torch.set_num_threads(1)
    checkpoint, compute = Checkpoint.open(readable_model), Compute(Backend("float32"))
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 512)
    checkpoint.close()
    tokenizer = Tokenizer(readable_model)
    grammars = Grammars(lambda: token_bytes(tokenizer), trunk.config.vocab_size, frozenset({EOS}))
    yield Rig(trunk, tokenizer, grammars)
    grammars.close()
