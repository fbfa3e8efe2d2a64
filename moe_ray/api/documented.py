"""The base of all bodies and answers: what /openapi.json says of their fields is what their code says."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Documented(BaseModel):
    """A model whose JSON schema describes each field by the docstring below it."""

    model_config = ConfigDict(use_attribute_docstrings=True)
