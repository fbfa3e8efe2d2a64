"""From the source of a grammar to what masks are made of: the one place that says how xgrammar is called."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from xgrammar import CompiledGrammar, GrammarCompiler, TokenizerInfo, VocabType
from xgrammar import Grammar as Parsed

from moe_ray.engine.grammar.schema_rules import unsupported
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar

MAX_WHITESPACE: Final = 32
"""Most blanks and line ends between two tokens of JSON: a model that loves them would write nothing else."""
_CHARACTER: Final = r"[^\"\\\r\n]"
_JSON_CHARACTER: Final = r"[^\0-\x1f\"\\\r\n]"
_ESCAPE: Final = re.compile(r"\\(?:x([0-9a-f]{2})|.)")
_PLACE: Final = re.compile(r"\[\d\d:\d\d:\d\d\] \S+: |Check failed: \(.*?\) is \w+: ")
"""What xgrammar's messages begin with: the time and a line of its code."""


def tokenizer_info(
    token_bytes: list[bytes | None], vocab_size: int, end_token_ids: frozenset[int] = frozenset()
) -> TokenizerInfo:
    """The vocabulary of a model of `vocab_size` ids, and one token more: the end of a grammar.

    `token_bytes`: see `TokenBytes`. `end_token_ids` are nothing that a grammar could ask for.
    """
    vocabulary = [b""] * (vocab_size + 1)
    for token_id, text in enumerate(token_bytes[:vocab_size]):
        if token_id not in end_token_ids:
            # A byte that no UTF-8 has: no text matches, and a structural tag can ask for the token by its id.
            vocabulary[token_id] = b"\xff%d" % token_id if text is None else text
    vocabulary[vocab_size] = b"\xffend"
    return TokenizerInfo(vocabulary, VocabType.RAW, vocab_size=vocab_size + 1, stop_token_ids=[vocab_size])


def grammar_compiler(info: TokenizerInfo) -> GrammarCompiler:
    """A compiler on the calling thread alone, without a cache of its own."""
    return GrammarCompiler(info, max_threads=1, cache_enabled=False)


def compile_source(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
    """Compile `grammar`. Raises `InvalidRequest` where it is wrong or not supported, `MemoryError`."""
    try:
        return _compile(compiler, grammar)
    except (RuntimeError, ValueError, TypeError) as error:
        if "bad_alloc" in str(error):
            raise MemoryError from None
        raise InvalidRequest(f"`grammar` is no {_NAMES[grammar.kind]}: {told(str(error))}", "grammar") from None


def told(message: str) -> str:
    """A message of xgrammar without where in its code it comes from."""
    return " ".join(_PLACE.sub("", message).split())[:400]


def check_schemas(grammar: Grammar) -> None:
    """Raise `InvalidRequest` where a schema of `grammar` is no JSON, or asks for what would be ignored."""
    if grammar.kind not in ("json_schema", "structural_tag"):
        return
    try:
        content = json.loads(grammar.source)
        found = next((each for schema in _schemas(grammar.kind, content) if (each := unsupported(schema))), None)
    except ValueError as error:
        raise InvalidRequest(f"`grammar` is no JSON: {error}", "grammar") from None
    except RecursionError:
        raise InvalidRequest("`grammar` is nested too deeply", "grammar") from None
    if found is not None:
        raise InvalidRequest(f"`grammar`: {found}", "grammar")


_NAMES: Final = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "ebnf": "EBNF grammar",
    "structural_tag": "structural tag",
}


def _compile(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
    source = grammar.source
    match grammar.kind:
        case "json_object":
            return compiler.compile_json_schema('{"type": "object"}', max_whitespace_cnt=MAX_WHITESPACE)
        case "json_schema":
            parsed = Parsed.from_json_schema(source, max_whitespace_cnt=MAX_WHITESPACE)
            return compiler.compile_grammar(_without_control_characters(parsed))
        case "regex":
            return compiler.compile_regex(source)
        case "ebnf":
            return compiler.compile_grammar(source)
        case "structural_tag":
            parsed = Parsed.from_structural_tag(source)
            return compiler.compile_grammar(_without_control_characters(parsed))


def _without_control_characters(parsed: Parsed) -> Parsed:
    """JSON has none in its strings; xgrammar 0.2.8 lets them pass where a schema limits a string's length."""
    text = str(parsed)
    if _CHARACTER not in text:
        return parsed
    return Parsed.from_ebnf(_ESCAPE.sub(_four_digits, text.replace(_CHARACTER, _JSON_CHARACTER)))


def _four_digits(escape: re.Match[str]) -> str:
    """ "ße" is printed as "\\xdfe", which would be read as one character."""
    return f"\\u00{escape[1]}" if escape[1] else escape[0]


def _schemas(kind: str, content: Any) -> list[Any]:
    """The JSON schemas of a schema or a structural tag."""
    if kind == "json_schema":
        return [content]
    found: list[Any] = []
    to_see = [content]
    while to_see:
        node = to_see.pop()
        if isinstance(node, dict) and "json_schema" in node:
            found.append(node["json_schema"])
        elif isinstance(node, dict | list):
            to_see += node.values() if isinstance(node, dict) else node
    return found
