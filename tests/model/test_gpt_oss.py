"""What gpt-oss has beside other families: MXFP4 stacks whose gates and ups alternate, sinks in long contexts, yarn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backends import BEST, open_backend
from random_families import save_random_family, save_random_gpt_oss
from safetensors.torch import load_file, save_file
from test_families import Case, assert_same, transformers_says, trunk_of
from test_long_parity import our_logits, their_logits
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.foreign import SINGLE
from moe_ray.model.formats.mxfp4 import GROUPING
from moe_ray.model.layers import rope_table
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus
from moe_ray.model.weights import matrices_of_expert, weights_of_expert

NATIVE = "native float32"
BACKENDS = [Backend("float32"), *([Backend("float32", trunk="native", experts="native", kernels=BEST)] if BEST else [])]
native = pytest.mark.skipif(BEST is None, reason="this CPU has no native kernels")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The values of `mxfp4`, as transformers reads them."""
    return tmp_path_factory.mktemp("floats")


@pytest.fixture(scope="module")
def mxfp4(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as gpt-oss is published, and its values written to `floats`."""
    return save_random_gpt_oss(floats, tmp_path_factory.mktemp("mxfp4"))


def test_mxfp4_by_torch(floats: Path, mxfp4: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_surplus(Checkpoint.open(mxfp4))
    assert not [record for record in caplog.records if record.name.startswith("moe_ray")]
    case = Case("gpt_oss", floats, *transformers_says(floats))
    assert_same(Engine(trunk_of(mxfp4), EngineOptions(64, 8, max_model_len=96)), case)


def test_every_expert_is_read_from_its_own_bytes(floats: Path, mxfp4: Path) -> None:
    stored, tensors = Checkpoint.open(mxfp4), load_file(floats / SINGLE)
    config = stored.config
    fingerprints = set()
    for expert in range(config.num_local_experts):
        at = "model.layers.1.mlp.experts."
        gate_up, down = tensors[f"{at}gate_up_proj"][expert], tensors[f"{at}down_proj"][expert]
        biases = tensors[f"{at}gate_up_proj_bias"][expert], tensors[f"{at}down_proj_bias"][expert]
        expected = (gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T, biases[0][::2], biases[0][1::2], biases[1])
        for directory in (floats, mxfp4):
            checkpoint = Checkpoint.open(directory)
            for weight, values in zip(weights_of_expert(config, 1, expert), expected, strict=True):
                assert torch.equal(checkpoint.read(weight, torch.float32), values), weight
        for weight in matrices_of_expert(config, 1, expert):
            found = stored.find(weight)
            assert found.grouping == GROUPING
            assert found.nbytes == weight.numel * 17 // 32, "4 bits each, and 8 for each 32"
            joined = 1 if weight.role == "down" else 2
            for part in found.parts:
                whole = load_file(mxfp4 / SINGLE)[part.name]
                of_expert = whole[expert].numel()
                assert (part.offset, part.span) == (expert * of_expert, of_expert)
                assert part.span == joined * part.nbytes
            fingerprints.add(stored.fingerprint([weight]))
    assert len(fingerprints) == 3 * config.num_local_experts
    stored.close()


@native
def test_mxfp4_is_held_as_it_is_stored(mxfp4: Path) -> None:
    """Products differ by what inputs are rounded to, no more."""
    rows = torch.randn((9, 128), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(9, generator=torch.Generator().manual_seed(1))
    keys = [(1, 4)]
    ours, reference = (
        ExpertReader(Checkpoint.open(mxfp4), keys, open_backend(name)) for name in (NATIVE, "torch float32")
    )
    assert ours.held((1, 4)) == "int4 by table in groups of 32"
    got, expected = (reader.read((1, 4)).forward(rows, weights) for reader in (ours, reference))
    most = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * most)
    assert float((got - expected).square().mean().sqrt()) < 0.005 * most
    assert ours.bytes_read == 3 * 128 * 96 * 17 // 32 + 4 * (2 * 96 + 128)


@pytest.mark.parametrize("backend", [pytest.param(NATIVE, marks=native), "torch float32", "torch bfloat16"])
@pytest.mark.parametrize("stored", ["floats", "mxfp4"])
def test_biases_come_from_a_peer_as_well(backend: str, stored: str, floats: Path, mxfp4: Path) -> None:
    directory = {"floats": floats, "mxfp4": mxfp4}[stored]
    reader = ExpertReader(Checkpoint.open(directory), [(0, 2)], open_backend(backend))
    assert reader.layout.options == (("biases", "gate and up, down"),)
    own, blank = reader.read((0, 2)), reader.blank((0, 2))
    for mine, theirs in zip(blank.buffers, own.buffers(), strict=True):
        mine[:] = theirs
    rows = torch.randn((5, 128), generator=torch.Generator().manual_seed(2)).to(getattr(torch, backend.split()[1]))
    assert torch.equal(blank.make().forward(rows, torch.ones(5)), own.forward(rows, torch.ones(5)))
    zeros = own.forward(torch.zeros_like(rows), torch.ones(5))
    assert float(zeros.abs().min()) > 0, "biases alone make this"


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("window", [37, 700])
def test_sinks_and_windows_some_way_into_a_context(backend: Backend, window: int, tmp_path: Path) -> None:
    """Over three partitions of 512 positions, in chunks; a layer with a window, and one without."""
    save_random_family(tmp_path, "gpt_oss", sliding_window=window, max_position_embeddings=2048)
    tokens = torch.randint(3, 128, (1200,), generator=torch.Generator().manual_seed(8)).tolist()
    wanted = [1, 36, 511, 512, 513, 699, 700, 1198, 1199]
    expected = their_logits(tmp_path, tokens, wanted)
    torch.testing.assert_close(our_logits(tmp_path, backend, tokens, wanted, 509), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("truncate", [False, True])
def test_rotations_are_those_of_transformers(truncate: bool) -> None:
    theirs = GptOssConfig(num_hidden_layers=2)
    theirs.rope_parameters["truncate"] = truncate
    positions = torch.tensor([[0, 1, 127, 4095, 4096, 131071]])
    cos, sin = GptOssRotaryEmbedding(theirs)(torch.zeros(1, 6, 64), positions)
    config = ModelConfig.from_dict(theirs.to_dict())
    ours = rope_table(config, 131072, torch.float32, torch.device("cpu"))[positions[0]]
    assert torch.equal(ours[..., :32], torch.stack((cos[0], sin[0]), dim=1))
    assert config.max_position_embeddings == 131072


def test_what_config_json_does_not_say() -> None:
    raw = GptOssConfig(num_hidden_layers=5).to_dict()
    full = ModelConfig.from_dict(raw)
    bare = ModelConfig.from_dict({key: raw[key] for key in raw if key not in ("layer_types", "rope_parameters")})
    assert full.full_layers == bare.full_layers == {1, 3}
    assert [bare.window_of(layer) for layer in range(5)] == [128, None, 128, None, 128]
    device = torch.device("cpu")
    tables = [rope_table(each, 64, torch.float32, device) for each in (full, bare)]
    assert torch.equal(*tables)


def test_alternating_stacks_in_other_formats_are_refused(floats: Path, mxfp4: Path, tmp_path: Path) -> None:
    tensors = load_file(floats / SINGLE)
    for name in [name for name in tensors if f"{name}_blocks" in load_file(mxfp4 / SINGLE)]:
        experts, inputs, outputs = tensors[name].shape
        tensors[name] = torch.zeros((experts, outputs, inputs)).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones((experts, 1, 1))
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((floats / "config.json").read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    for weight in matrices_of_expert(checkpoint.config, 0, 0):
        with pytest.raises(CheckpointError, match="fp8 weights of experts whose gate and up alternate are not read"):
            checkpoint.find(weight)
