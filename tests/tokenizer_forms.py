"""Checkpoint directories with Mixtral's vocabulary in each of the forms in which people have it."""

from __future__ import annotations

import base64
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

DATA = resources.files("mistral_common") / "data"
MODELS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKEN = "tekken_240911.json"
TEXTS = [
    "The capital of France is Paris.",
    "  two leading spaces, a\ttab,\r\n\nnewlines   and trailing  ",
    "a  b   c    d",
    "中文、日本語、한국어 混在 text",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji 🇫🇷",
    "नमस्ते مرحبا שלום ไทย",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b zero width, e\u0301 combining \u00a0 ﬁ ½",
    "def f(x):\n    return x ** 2  # ✓\n",
]
WITHOUT_WAY_BACK = ["", " ", "\n\nx", "▁a ▁▁b"]  # sentencepiece does not give the very text back
IM_START, IM_END = 32000, 32001


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def mixtral_config(directory: Path, **more: Any) -> None:
    """config.json as far as tokenizers need it."""
    write_json(directory / "config.json", {"model_type": "mixtral", "vocab_size": 32768, **more})


def sentencepiece_model(directory: Path, version: str = "v1") -> Path:
    """tokenizer.model alone."""
    with resources.as_file(DATA / MODELS[version]) as model:
        shutil.copy(model, directory / "tokenizer.model")
    return directory


def new_tokenizer_json(directory: Path) -> Path:
    """tokenizer.json as of mid 2024: only the start of the whole text gets a space, merges are pairs."""
    content = _tokenizer_json(directory)
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return _with_config(directory, content, legacy=False)


def old_tokenizer_json(directory: Path) -> Path:
    """tokenizer.json as Mixtral was published: every text between special tokens gets a space, merges are strings."""
    content = _tokenizer_json(directory)
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    content["pre_tokenizer"] = None
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    return _with_config(directory, content)


def chatml_tokenizer(directory: Path, form: str) -> Path:
    """Mixtral's vocabulary with two tokens added for ChatML, saved as `form`: json, decoder or added_tokens."""
    sentencepiece_model(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, add_bos_token=True)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "<|im_end|>"}
    if form == "json":
        (directory / "tokenizer.model").unlink()
        write_json(directory / "tokenizer_config.json", config)
        return directory
    (directory / "tokenizer.json").unlink()
    if form == "decoder":
        names = {0: "<unk>", 1: "<s>", 2: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
        config["added_tokens_decoder"] = {str(i): {"content": name, "special": True} for i, name in names.items()}
    else:
        write_json(directory / "added_tokens.json", {"<|im_end|>": IM_END, "<|im_start|>": IM_START})
        special: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
        special["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
        write_json(directory / "special_tokens_map.json", special)
    write_json(directory / "tokenizer_config.json", config)
    return directory


def tekken(directory: Path, version: str = "v3", listed: bool = True, size: int | None = None) -> Path:
    """tekken.json of a version, its special tokens listed (as today) or not; `size` cuts the vocabulary."""
    content = json.loads((DATA / TEKKEN).read_text("utf-8"))
    content["config"]["version"] = version
    special = content["config"]["default_num_special_tokens"]
    if size is not None:
        content["config"]["default_vocab_size"] = special + size
        content["vocab"] = content["vocab"][:size]
    if listed:
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
        names += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
        names += ["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
        names += ["[ARGS]", "[CALL_ID]"]
        content["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
        content.pop("image", None)
    assert base64.b64decode(content["vocab"][-1]["token_bytes"])
    write_json(directory / "tekken.json", content)
    return directory


def _tokenizer_json(directory: Path) -> dict[str, Any]:
    sentencepiece_model(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, add_bos_token=True)
    (directory / "tokenizer.model").unlink()
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content


def _with_config(directory: Path, content: dict[str, Any], **config: Any) -> Path:
    write_json(directory / "tokenizer.json", content)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    write_json(directory / "tokenizer_config.json", {**named, **config})
    return directory
