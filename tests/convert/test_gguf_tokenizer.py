"""The vocabulary of a GGUF file gives the tokens of the tokenizer it was made of, for both kinds of BPE."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from gguf_files import add_vocabulary
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from moe_ray.convert.gguf_metadata import GgufMetadata
from moe_ray.convert.gguf_tokenizer import _CUTS, tokenizer_config_of, tokenizer_of
from moe_ray.convert.recipe import text_bytes
from moe_ray.errors import CheckpointError
from moe_ray.model.gguf_file import read_gguf
from moe_ray.text.tokenizer import Tokenizer

ODD = [
    "",
    " ",
    "  two spaces  and  tabs\t\tand\n\n\nlines \n ",
    "12345 and 3.14, 1,000,000; x=7y  42",
    "don't I'll we've O'Neil's",
    "Ünïcödé, 東京, Привет мир, 🙂👩‍👩‍👧 and é",
    "def f(x):\n    return {'a': [1, 2], \"b\": None}  # ok\n",
    "ALLCAPS CamelCase snake_case kebab-case",
    "▁ literally, and  non-breaking\u2009space",
    "\x00\x01 control",
]


def texts() -> list[str]:
    """Odd ones, sentences, and pieces of the calibration text cut anywhere."""
    entries = json.loads(text_bytes())
    words = json.dumps(entries, ensure_ascii=False)
    rng = random.Random(0)
    cuts = [(at := rng.randrange(len(words) - 400), at + rng.randrange(1, 400)) for _ in range(300)]
    return ODD + [words[start:end] for start, end in cuts]


def metadata(writer: GGUFWriter, path: Path) -> GgufMetadata:
    writer.add_context_length(128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufMetadata(str(path), read_gguf(path).metadata)


def unpacked(found: GgufMetadata, directory: Path) -> Tokenizer:
    tokenizer_of(found).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config_of(found)))
    return Tokenizer(directory)


def test_a_byte_level_vocabulary(demo_model: Path, tmp_path: Path) -> None:
    """SmolLM2's, through GGUF and back."""
    theirs = PreTrainedTokenizerFast.from_pretrained(demo_model)
    writer = GGUFWriter(tmp_path / "t.gguf", "llama")
    add_vocabulary(writer, theirs, "smollm", len(theirs) + 3)
    ours, original = unpacked(metadata(writer, tmp_path / "t.gguf"), tmp_path), Tokenizer(demo_model)
    special = ["<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b"]
    for text in texts() + special:
        ids = ours.encode(text)
        assert ids == original.encode(text), text
        assert ours.decode(ids) == original.decode(ids)
    assert ours.special_ids == original.special_ids
    assert (ours.bos_token_id, ours.eos_token_ids) == (original.bos_token_id, original.eos_token_ids - {0})
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
    assert ours.apply_chat_template(chat) == original.apply_chat_template(chat)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceProcessor:
    """A small model of Llama's and Mixtral's kind."""
    directory = tmp_path_factory.mktemp("spm")
    (directory / "text").write_text("\n".join(t.replace("\n", " ") for t in texts() if t.strip()), "utf-8")
    SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "m"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
        num_threads=1,
    )
    return SentencePieceProcessor(model_file=str(directory / "m.model"))


def sentencepiece_metadata(model: SentencePieceProcessor, path: Path, **flags: bool) -> GgufMetadata:
    """As `SentencePieceVocab` of convert_hf_to_gguf.py writes it."""
    writer = GGUFWriter(path, "llama")
    kinds = []
    for i in range(len(model)):
        kind = TokenType.NORMAL
        if model.is_unknown(i):
            kind = TokenType.UNKNOWN
        elif model.is_control(i):
            kind = TokenType.CONTROL
        elif model.is_byte(i):
            kind = TokenType.BYTE
        elif model.id_to_piece(i) in ("[INST]", "[/INST]"):
            kind = TokenType.USER_DEFINED
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(i) for i in range(len(model))])
    writer.add_token_scores([model.get_score(i) for i in range(len(model))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    return metadata(writer, path)


def test_a_sentencepiece_vocabulary(sentencepiece: SentencePieceProcessor, tmp_path: Path) -> None:
    """The ids are sentencepiece's own."""
    ours = unpacked(sentencepiece_metadata(sentencepiece, tmp_path / "t.gguf"), tmp_path)
    bos = sentencepiece.bos_id()
    for text in texts():
        expected = sentencepiece.encode(text)
        ids = ours.encode(text)
        if text:
            assert ids == [bos, *expected], text
        assert ours.decode(ids) == sentencepiece.decode(expected)
    assert ours.eos_token_ids == {sentencepiece.eos_id()}
    assert ours.token_bytes(sentencepiece.piece_to_id("<0x0A>")) == b"\n"
    instruction = sentencepiece.piece_to_id("[INST]")
    assert ours.encode("[INST] hi")[1] == instruction, "one token, not its letters"


@pytest.mark.parametrize(
    ("flags", "framed"),
    [
        ({}, (True, False)),
        ({"add_bos_token": False}, (False, False)),
        ({"add_eos_token": True}, (True, True)),
        ({"add_bos_token": False, "add_eos_token": True}, (False, True)),
    ],
)
def test_what_a_text_begins_and_ends_with(
    flags: dict[str, bool], framed: tuple[bool, bool], sentencepiece: SentencePieceProcessor, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(sentencepiece_metadata(sentencepiece, tmp_path / "t.gguf", **flags))
    inner = sentencepiece.encode("some text")
    before, behind = ([token] if add else [] for token, add in zip((1, 2), framed, strict=True))
    assert tokenizer.encode("some text").ids == [*before, *inner, *behind]
    pair = tokenizer.encode("some text", "some text").ids
    assert pair == [*before, *inner, *behind, *before, *inner, *behind]


def test_no_space_in_front(sentencepiece: SentencePieceProcessor, tmp_path: Path) -> None:
    ours = unpacked(sentencepiece_metadata(sentencepiece, tmp_path / "t.gguf", add_space_prefix=False), tmp_path)
    assert ours.encode("text", add_special_tokens=False)[0] != ours.encode(" text", add_special_tokens=False)[0]
    assert ours.decode(ours.encode("text")) == "text"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_where_words_are_cut_is_as_transformers_has_it(pre: str) -> None:
    assert _CUTS[pre].pattern == GGUF_PRE_TOKENIZER_SPLITS[pre]


def test_an_unknown_cut_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("viking")
    writer.add_token_list(["a", "b"])
    with pytest.raises(CheckpointError, match=r"`tokenizer.ggml.pre` is 'viking', supported: gpt-2, .*tekken"):
        tokenizer_of(metadata(writer, tmp_path / "t.gguf"))
