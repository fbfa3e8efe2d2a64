"""What a text must match: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_*`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from moe_ray.api.documented import Documented
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.answers.structure import either, grammar_of, text

MAX_CHOICES_OF_TEXT: Final = 1024
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class JsonSchemaBody(Documented):
    """A JSON schema with a name."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Documented):
    """OpenAI's field, with vLLM's further type, and TGI's forms: a type and a `value`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "structural_tag", "json", "regex"]
    json_schema: JsonSchemaBody | None = None
    value: dict[str, Any] | str | None = None

    def grammar(self) -> Grammar | None:
        """What it asks for; None for any text."""
        if self.value is not None or self.type in ("json", "regex"):
            return self._of_value()
        match self.type:
            case "text":
                return None
            case "json_object":
                return Grammar("json_object")
            case "structural_tag":
                return Grammar("structural_tag", json.dumps({"type": self.type, **(self.model_extra or {})}))
        if self.json_schema is None:
            where = "response_format.json_schema"
            raise InvalidRequest(f"`{where}` is required with the type json_schema", where)
        if not _NAME.fullmatch(self.json_schema.name):
            where = "response_format.json_schema.name"
            raise InvalidRequest(f"`{where}` must be 1 to 64 of a-z, A-Z, 0-9, _ and -", where)
        if self.json_schema.schema_ is None:
            where = "response_format.json_schema.schema"
            raise InvalidRequest(f"`{where}` is required", where)
        return Grammar("json_schema", json.dumps(self.json_schema.schema_, ensure_ascii=False))

    def _of_value(self) -> Grammar:
        """As Hugging Face's clients ask a TGI server."""
        where = "response_format.value"
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise InvalidRequest(f"`{where}` must be a regular expression with the type regex", where)
            return Grammar("regex", self.value)
        if self.type not in ("json", "json_object", "json_schema") or not isinstance(self.value, dict):
            raise InvalidRequest(f"`{where}` must be a JSON schema, with the type json, or be left out", where)
        return Grammar("json_schema", json.dumps(self.value, ensure_ascii=False))


class StructuredOutputs(Documented):
    """vLLM's field: one of these."""

    model_config = ConfigDict(extra="forbid")

    choice: list[str] | None = None
    grammar: str | None = None
    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    structural_tag: dict[str, Any] | str | None = None

    def grammars(self) -> dict[str, Grammar]:
        """Field → what it asks for, of those that are given."""
        given: dict[str, Any] = {
            "choice": self.choice,
            "grammar": self.grammar,
            "json": self.json_,
            "json_object": self.json_object or None,
            "regex": self.regex,
            "structural_tag": self.structural_tag,
        }
        found: dict[str, Grammar] = {}
        for name, value in given.items():
            if value is not None:
                field = f"structured_outputs.{name}"
                found[field] = _READERS[name](value, field)
        return found


class TextFormatFields(Documented):
    """The fields of a body that say what its text must match; at most one of them is given."""

    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def text_grammar(self) -> Grammar | None:
        """What the text must match; None: nothing. Raises `InvalidRequest` naming the field."""
        return next(iter(self._grammars().values()), None)

    def grammar_field(self) -> str:
        """The field that asks for a grammar; "tools" where none of these does."""
        return next(iter(self._grammars()), "tools")

    def _grammars(self) -> dict[str, Grammar]:
        """Field → what it asks for: one, or none."""
        found: dict[str, Grammar] = {}
        asked = None if self.response_format is None else self.response_format.grammar()
        if asked is not None:
            found["response_format"] = asked
        if self.structured_outputs is not None:
            found |= self.structured_outputs.grammars()
            if not self.structured_outputs.model_fields_set:
                names = ", ".join(_READERS)
                raise InvalidRequest(f"`structured_outputs` must have one of {names}", "structured_outputs")
        for name in ("choice", "grammar", "json", "regex"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                found[f"guided_{name}"] = _READERS[name](value, f"guided_{name}")
        if len(found) > 1:
            first, second, *_ = found
            raise InvalidRequest(f"`{second}` does not go with `{first}`: give one of them", second)
        return found


def _choice(value: list[str], field: str) -> Grammar:
    if not 1 <= len(value) <= MAX_CHOICES_OF_TEXT or not all(value):
        raise InvalidRequest(f"`{field}` must be 1 to {MAX_CHOICES_OF_TEXT} texts, none of them empty", field)
    return grammar_of(either([text(each) for each in dict.fromkeys(value)]))


def _json(value: Mapping[str, Any] | str, field: str) -> Grammar:
    return Grammar("json_schema", _object_text(value, field))


def _tag(value: Mapping[str, Any] | str, field: str) -> Grammar:
    return Grammar("structural_tag", _object_text(value, field))


def _text(kind: Literal["ebnf", "regex"], value: str, field: str) -> Grammar:
    if not value:
        raise InvalidRequest(f"`{field}` must not be empty", field)
    return Grammar(kind, value)


_READERS: Final[dict[str, Callable[[Any, str], Grammar]]] = {
    "choice": _choice,
    "grammar": lambda value, field: _text("ebnf", value, field),
    "json": _json,
    "json_object": lambda value, field: Grammar("json_object"),
    "regex": lambda value, field: _text("regex", value, field),
    "structural_tag": _tag,
}
"""Field of `structured_outputs` → what reads its value."""


def _object_text(value: Mapping[str, Any] | str, field: str) -> str:
    """JSON text of an object that is given as such or as its text."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise InvalidRequest(f"`{field}` must be a JSON object, or its text", field)
        return value
    return json.dumps(value, ensure_ascii=False)
