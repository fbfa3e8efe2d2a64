"""GET /v1/models, which two APIs share: a request that names Anthropic's version gets Anthropic's format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI, Request

from moe_ray.api.anthropic.model_cards import model_info
from moe_ray.api.anthropic.routes import VERSION_HEADER
from moe_ray.api.anthropic.schemas import MessageError, MessageModel, MessageModels
from moe_ray.api.openai.answers import ModelCard, ModelList, OpenAIError
from moe_ray.api.openai.model_cards import model_card
from moe_ray.api.route_answers import answers
from moe_ray.api.service import ServedModel

EITHER_ERROR: Final = OpenAIError | MessageError
Card = Callable[[ServedModel, str], dict[str, Any]]


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""

    @app.get("/v1/models", responses=answers(ModelList | MessageModels, EITHER_ERROR, statuses=()))
    async def models(request: Request) -> dict[str, Any]:
        """The served model under each of its names: OpenAI's list, or Anthropic's page."""
        cards = [_card_of(request)(service.check_model(name).model, name) for name in service.names]
        if VERSION_HEADER in request.headers:
            return {"data": cards, "has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
        return {"object": "list", "data": cards}

    @app.get("/v1/models/{model:path}", responses=answers(ModelCard | MessageModel, EITHER_ERROR, statuses=(404,)))
    async def model(model: str, request: Request) -> dict[str, Any]:
        """One model card; 404 for a model that is not served."""
        return _card_of(request)(service.check_model(model).model, model)


def _card_of(request: Request) -> Card:
    return model_info if VERSION_HEADER in request.headers else model_card
