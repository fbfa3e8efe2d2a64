"""Encoding and whole-text decoding, on a byte-level tokenizer and on Mixtral's own sentencepiece model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_forms import TEXTS
from transformers import AutoTokenizer

from moe_ray.errors import CheckpointError
from moe_ray.text.tokenizer import Tokenizer


def test_agrees_with_autotokenizer(demo_model: Path, smol: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(demo_model)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    assert smol.apply_chat_template(chat) == reference.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    for text in TEXTS:
        assert smol.encode(text) == reference.encode(text)
        assert smol.decode(smol.encode(text)) == text


def test_never_imports_torch(demo_model: Path, mixtral_dir: Path) -> None:
    code = (
        "import sys; from moe_ray.text.tokenizer import Tokenizer; a = Tokenizer(sys.argv[1]);"
        "b = Tokenizer(sys.argv[2]);"
        "a.apply_chat_template([{'role': 'user', 'content': 'x'}]); b.decode(b.encode('x'));"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(demo_model), str(mixtral_dir)], check=True, timeout=60)


def test_bos_is_added_once(mixtral: Tokenizer) -> None:
    assert mixtral.encode("Hi")[0] == mixtral.bos_token_id == 1
    spelled_out = "<s> [INST] Hi [/INST]"
    assert mixtral.encode(spelled_out) == mixtral.encode(spelled_out, add_special_tokens=False)
    assert mixtral.encode("Hi", add_special_tokens=False)[0] != 1
    chat = [{"role": "user", "content": "Hi"}]
    assert mixtral.apply_chat_template(chat, add_special_tokens=True) == mixtral.apply_chat_template(chat)
    assert mixtral.apply_chat_template(chat).count(1) == 1


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json \(or tokenizer\.model\) is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_eos_and_vocabulary_come_from_every_file(mixtral_dir: Path, tmp_path: Path) -> None:
    shutil.copy(mixtral_dir / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 32064}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {2, 7, 8, 9}
    assert tokenizer.vocab_size == 32064
    assert Tokenizer(mixtral_dir).vocab_size == 32000
    assert tokenizer.decode([32063]) == ""


@pytest.mark.parametrize("name", ["smol", "mixtral"])
def test_token_bytes_joined_are_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        spelled = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False))
        # sentencepiece puts a space in front of every text
        assert spelled.decode() == text if name == "smol" else f" {text}"
    special = next(iter(tokenizer.eos_token_ids))
    assert tokenizer.token_to_str(special) in ("</s>", "<|im_end|>")
