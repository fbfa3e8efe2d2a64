"""Writes docs/configuration.md: every key of the configuration, from the models of moe_ray/config. `make docs` runs it.

A row comes from the key's pydantic field (type, default, what is allowed) and from the docstring below it.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moe_ray.config import Config
from moe_ray.config.experts import ExpertOptions
from moe_ray.config.tree import ENV_PREFIX

PAGE = Path(__file__).with_name("configuration.md")
HEAD = f"""\
# Configuration reference

<!-- Written by docs/generate_configuration.py from moe_ray/config. Do not edit: run `make docs`. -->

The configuration is one tree. Each key is looked up in four places, and the first that has it decides:

1. a flag of the command line, such as `--max-num-seqs 32`;
2. an environment variable, `{ENV_PREFIX}` and the path of the key in capitals with `__` between its parts, such as
   `{ENV_PREFIX}ENGINE__MAX_NUM_SEQS=32`; lists and mappings are written as JSON;
3. a YAML file, given with `--config FILE` (a Serve config file has the same tree in the application's `args`);
4. the default.

A wrong key or value ends the command with one line that names the key and what is allowed. Whatever is not marked as
required may be left out.

```yaml
model: {{path: demo, dtype: bfloat16}}
engine: {{max_num_seqs: 32}}
experts:
  overrides:
    3: {{num_replicas: 2}}
```

Variables of other programs that are read too: `OPENAI_API_KEY` (the key that `moe-ray chat` sends), `RAY_ADDRESS`
(where `moe-ray status` and `moe-ray scale` look), `RAY_AUTH_TOKEN` and `RAY_AUTH_TOKEN_PATH` (Ray's own token),
`XDG_CACHE_HOME`, `CXX` (the compiler of the native code), and those of the Hugging Face Hub, such as `HF_TOKEN`.
"""
AFTER: Mapping[str, str] = {
    "experts.overrides": f"An override may set {', '.join(f'`{name}`' for name in ExpertOptions.model_fields)}.",
}
"""Path of a section or mapping → what the reference says after the table that has it."""


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Field → the docstring below it in the class that declares it last."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or not owner.__module__.startswith("moe_ray."):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = inspect.cleandoc(below.value.value)
    return found


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a key holds, alone, optionally or as the items of a list; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        models = {section_of(inner) for inner in get_args(annotation)} - {None}
        return models.pop() if len(models) == 1 else None
    return None


def type_name(annotation: Any) -> str:
    """A type as the reference writes it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return type_name(inner[0])
    if origin in (Union, types.UnionType):
        names = [type_name(each) for each in inner if each is not type(None)]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return "choice"
    if origin is tuple:
        return f"list of {type_name(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping" if inner[1] is Any else f"mapping, {type_name(inner[0])} → {type_name(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    named = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return named[annotation]


def allowed(field: FieldInfo) -> str:
    """The values that a field takes, as far as its type and bounds say; "" where every value of the type is allowed."""
    said = [f"`{choice}`" for choice in _choices(field.annotation)]
    bounds = _bounds(field.metadata) or _bounds([m for each in _members(field.annotation) for m in each])
    return ", ".join([*said, *bounds])


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for inner in get_args(annotation) for choice in _choices(inner)]
    return []


def _members(annotation: Any) -> list[tuple[Any, ...]]:
    """The constraints of annotated members of a union."""
    found = []
    for inner in get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ():
        for each in getattr(inner, "__metadata__", ()):
            found.append(tuple(each.metadata) if isinstance(each, FieldInfo) else (each,))
    return found


def _bounds(metadata: list[Any]) -> list[str]:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = {name: getattr(each, name) for each in metadata for name in words if getattr(each, name, None) is not None}
    if {"ge", "le"} == set(found):
        return [f"{found['ge']:g} to {found['le']:g}"]
    if any(getattr(each, "min_length", None) for each in metadata):
        return ["not empty"]
    return [f"{words[name]} {value:g}" for name, value in found.items()]


def default(field: FieldInfo) -> str:
    """A field's default as the reference writes it; "" where the meaning says what happens without one."""
    if field.default is PydanticUndefined:
        return "" if field.default_factory is not None else "required"
    if field.default is None or isinstance(field.default, BaseModel):
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def tables(model: type[BaseModel], path: str, variables: bool = True) -> list[str]:
    """The table of a section and those of the sections in it, as Markdown lines."""
    says, lines, inner = docstrings(model), [], []
    titled = f"## `{path}`" if path else "## Top level"
    lines += [titled, "", inspect.cleandoc(model.__doc__ or ""), ""]
    lines.append("| key | type | default | allowed | meaning |" + (" environment variable |" if variables else ""))
    lines.append("|---|---|---|---|---|" + ("---|" if variables else ""))
    for name, field in model.model_fields.items():
        section, key = section_of(field.annotation), f"{path}.{name}" if path else name
        if section is not None:
            listed = get_origin(field.annotation) is tuple
            inner += tables(section, key, variables and not listed)
            if not listed and not path and name not in says:
                continue  # a top-level section: its own table says all
        meaning = " ".join(says.get(name, "").split())
        cells = [f"`{name}`", type_name(field.annotation), default(field), allowed(field), meaning]
        if variables:
            cells.append(f"`{ENV_PREFIX}{key.replace('.', '__').upper()}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines.append("")
    for key, text in AFTER.items():
        if key.rpartition(".")[0] == path:
            lines += [text, ""]
    return lines + inner


def page() -> str:
    """The whole reference."""
    return HEAD + "\n" + "\n".join(tables(Config, "")).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
