"""`text-generation-launcher`: what TGI's flags and variables become."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_ray import __version__
from moe_ray.commands.tgi_arguments import TgiArguments, flag_of, parse_arguments
from moe_ray.commands.tgi_launcher import launch, meaning_of
from moe_ray.commands.tgi_mapping import KEYS, NOTES, REFUSED, Mapped, experts_per_actor, mapped
from moe_ray.config import Config, load_config
from moe_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


def told(words: str, **environ: str) -> Mapped:
    return mapped(parse_arguments(words.split(), environ), environ)


def config(words: str, **environ: str) -> Config:
    return load_config(told(words, **environ).flags)


def at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name] if isinstance(tree, Mapping) else getattr(tree, name)
    return tree


def test_the_command_of_the_article() -> None:
    words = "--model-id mistralai/Mixtral-8x7B-Instruct-v0.1 --num-shard 2 --max-batch-total-tokens 1024000"
    what = told(f"{words} --max-total-tokens 32000")
    made = load_config(what.flags)
    assert made.model.path == "mistralai/Mixtral-8x7B-Instruct-v0.1"
    assert (made.model.max_model_len, made.engine.kv_cache_tokens) == (32000, 1_024_000)
    assert (what.host, what.port, what.notes) == ("127.0.0.1", 3000, ())
    assert what.shards == 2
    assert [experts_per_actor(8, shards) for shards in (1, what.shards, 3, 8, 9)] == [8, 4, 3, 1, 1]


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--model-id /a/b", "model.path", "/a/b"),
        ("--revision=refs/pr/2", "model.revision", "refs/pr/2"),
        ("--dtype bfloat16", "model.dtype", "bfloat16"),
        ("--quantize eetq", "experts.quantize", "int8"),
        ("--quantize bitsandbytes-nf4", "trunk.quantize", "nf4"),
        ("--quantize gptq", "experts.quantize", None),
        ("--speculate 3", "engine.num_speculative_tokens", 3),
        ("--speculate 3", "engine.speculative", "ngram"),
        ("--speculate 0", "engine.speculative", "off"),
        ("--kv-cache-dtype int8", "engine.kv_cache_dtype", "int8"),
        ("--kv-cache-dtype fp8_e4m3fn", "engine.kv_cache_dtype", "fp8"),
        ("--max-concurrent-requests 200", "engine.max_waiting", 136),
        ("--max-concurrent-requests 8", "engine.max_num_seqs", 8),
        ("--max-batch-size 16", "engine.max_num_seqs", 16),
        ("--max-batch-prefill-tokens 4096", "engine.max_num_batched_tokens", 4096),
        ("--max-best-of 3", "gateway.tgi.max_best_of", 3),
        ("--max-stop-sequences 9", "gateway.tgi.max_stop_sequences", 9),
        ("--max-top-n-tokens 7", "gateway.tgi.max_top_n_tokens", 7),
        ("--max-input-tokens 100 --max-total-tokens 200", "gateway.tgi.max_input_tokens", 100),
        ("--max-input-length 100", "gateway.tgi.max_input_tokens", 100),
        ("--payload-limit 10", "gateway.tgi.payload_limit_bytes", 10),
        ("--disable-grammar-support", "gateway.tgi.grammars", False),
        ("--api-key a", "gateway.api_keys", ("a",)),
        ("--cors-allow-origin http://a --cors-allow-origin http://b", "gateway.cors_origins", ("http://a", "http://b")),
        ("--graceful-termination-timeout 5", "trunk.drain_s", 5),
    ],
)
def test_what_a_flag_becomes(words: str, key: str, value: object) -> None:
    assert at(config(words), key) == value


def test_each_flag_is_a_variable_and_the_flag_wins() -> None:
    environ = {"MODEL_ID": "/m", "MAX_TOTAL_TOKENS": "99", "CORS_ALLOW_ORIGIN": "http://a", "SHARDED": "false"}
    what = told("--max-total-tokens 100 -p 8080", **environ, DTYPE="", DISABLE_GRAMMAR_SUPPORT="true")
    made = load_config(what.flags)
    assert (made.model.path, made.model.max_model_len, made.model.dtype) == ("/m", 100, "auto")
    assert (made.gateway.cors_origins, made.gateway.tgi.grammars) == (("http://a",), False)
    assert (what.port, what.shards) == (8080, 1)


def test_the_name_of_a_container_is_not_bound_to() -> None:
    assert told("", HOSTNAME="0.0.0.0").host == "0.0.0.0"
    assert told("--hostname my-machine", HOSTNAME="e3b0c44298fc").host == "my-machine"
    what = told("", HOSTNAME="e3b0c44298fc")
    assert what.host == "127.0.0.1"
    assert "HOSTNAME=e3b0c44298fc" in what.notes[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--num-shards 2", r"has no --num-shards; did you mean --num-shard\?"),
        ("--num_shard 2", r"has no --num_shard; did you mean --num-shard\?"),
        ("model", "has no model"),
        ("--port", "--port: a value is missing"),
        ("--max-total-tokens --port 1", "--max-total-tokens: a value is missing"),
        ("--max-total-tokens many", "--max-total-tokens: .*got 'many'"),
        ("--quantize fp8", "use eetq"),
        ("--quantize int3", "--quantize: .*'awq'"),
        ("--kv-cache-dtype fp8_e5m2", "use fp8_e4m3fn"),
        ("--trust-remote-code", "no code of a model's repository"),
        ("--max-input-tokens 9 --max-input-length 9", "one thing"),
        ("--max-input-tokens 9 --max-total-tokens 9", "must be < --max-total-tokens. Given: 9 and 9"),
        *((f"--{name.replace('_', '-')}=1", "is not supported|should be") for name in REFUSED),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        told(words)


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"PORT in the environment: .*'99999'"):
        told("", PORT="99999")
    assert config("", TRUST_REMOTE_CODE="false").model.path == "demo"


def test_every_flag_has_one_meaning() -> None:
    tables: list[Mapping[str, str]] = [KEYS, NOTES, REFUSED]
    for name in TgiArguments.model_fields:
        assert sum(name in table for table in tables) == 1, name
        assert meaning_of(name)
    assert sum(map(len, tables)) == len(TgiArguments.model_fields)


def test_the_document_says_what_each_flag_is() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (.*) \|$", (ROOT / "docs" / "from-tgi.md").read_text("utf-8"), re.M)
    assert rows == [(flag_of(name), meaning_of(name)) for name in TgiArguments.model_fields]


def test_help_and_version_start_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    launch(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {flag_of(name)} " in said or f"  {flag_of(name)}\n" in said for name in TgiArguments.model_fields)
    launch(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_what_has_no_meaning_is_said_in_a_line() -> None:
    what = told("--prometheus-port 9 --usage-stats off --otlp-service-name router")
    assert len(what.notes) == 3
    assert all(note.startswith("--") and "has no meaning here" in note for note in what.notes)


def test_no_cuda_graphs_is_eager() -> None:
    assert told("--cuda-graphs 0").flags["model"]["enforce_eager"] is True
    assert told("--cuda-graphs 1,2,4").flags["model"]["enforce_eager"] is None


def test_arguments_are_told_as_tgi_does_without_secrets() -> None:
    lines = parse_arguments(["--api-key", "secret", "--num-shard", "2"], {}).lines()
    assert (lines[0], lines[-1]) == ("Args {", "}")
    assert "    num_shard: 2," in lines
    assert "secret" not in "".join(lines)
