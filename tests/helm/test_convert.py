"""The download Job's second half: a dense model becomes a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_hub import Hub, download, script
from helm_rendering import Manifest, render


@pytest.mark.slow
def test_upcycling_what_was_downloaded(hub: str, tmp_path: Path) -> None:
    """The Job's own environment, but for the volume's path: a dense Llama arrives, experts are what the actors find."""
    dense(tmp_path / "dense")
    Hub.files = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
    download_values = {"enabled": True, "repo": "owner/llama", "convert": "upcycle", "upcycle": {"topK": 1, "noise": 0}}
    values = {"numLocalExperts": 4, "volume": {"enabled": True}, "download": download_values}
    rendered = render({"model": values})
    (container,) = rendered.one("Job")["spec"]["template"]["spec"]["containers"]
    env = {e["name"]: e["value"].replace("/models/", f"{tmp_path}/") for e in container["env"] if "value" in e}
    names = ("REPO", "REVISION", "DIRECTORY", "WANTED", "CONVERT", "SOURCE")
    target = Path(env["DIRECTORY"])
    target.mkdir()
    (target / "config.json").write_text("left by a try that was cut short")
    first = download(hub, tmp_path, **{name: env[name] for name in names})
    assert first.returncode == 0, first.stderr
    assert "upcycle: 1 of 2 layers" in first.stdout
    config = json.loads((target / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 1)
    assert config["model_type"] == "mixtral"
    assert script("wait_for_model").missing(target, env["WANTED"]) == ""
    assert rendered.application["args"]["model"]["path"] == container_value(container, "DIRECTORY")
    assert "already" in download(hub, tmp_path, **{name: env[name] for name in names}).stdout


def container_value(container: Manifest, name: str) -> str:
    (value,) = [e["value"] for e in container["env"] if e["name"] == name]
    found: str = value
    return found


def dense(path: Path) -> None:
    """A small random Llama with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
