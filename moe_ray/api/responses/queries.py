"""The query parameters of stored responses, and a page of a list of items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from moe_ray.api.documented import Documented
from moe_ray.api.openapi import schema_of
from moe_ray.api.responses.conversation import Item
from moe_ray.errors import InvalidRequest


class _Query(Documented):
    model_config = ConfigDict(extra="forbid")


class RetrieveQuery(_Query):
    """Of GET /v1/responses/{response_id}."""

    stream: bool = False
    starting_after: Annotated[int, Field(ge=0)] | None = None
    """Events behind the one of this number."""
    include: list[str] = []
    """A stored response has all that it was created with."""
    include_obfuscation: Literal["true", "false"] = "false"
    """The events are those that were made at first."""


class ItemsQuery(_Query):
    """Of GET /v1/responses/{response_id}/input_items."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    include: list[str] = []


_Q = TypeVar("_Q", bound=_Query)


def parse_query(kind: type[_Q], given: Iterable[tuple[str, str]]) -> _Q:
    """Validate query parameters; raises `InvalidRequest` naming the one that is wrong."""
    found: dict[str, Any] = {}
    for name, value in given:
        if name.removesuffix("[]") == "include":
            found.setdefault("include", []).append(value)
        else:
            found[name] = value
    try:
        query = kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise InvalidRequest(f"`{name}`: {first['msg']}", name) from None
    return query


def query_parameters(kind: type[_Query]) -> dict[str, Any]:
    """`openapi_extra` of a route with these query parameters."""
    fields = schema_of(kind)["properties"]
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]}


def page_of(items: Sequence[Item], query: ItemsQuery) -> dict[str, Any]:
    """A page of a list; raises `InvalidRequest` for an `after` that is no id of the list."""
    ordered = list(items) if query.order == "asc" else list(reversed(items))
    if query.after is not None:
        at = next((i for i, item in enumerate(ordered) if item["id"] == query.after), None)
        if at is None:
            raise InvalidRequest(f"`after`: there is no item '{query.after}'", "after")
        ordered = ordered[at + 1 :]
    page = ordered[: query.limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(ordered) > len(page)}
