"""Whether the model is served, as probes ask it: OpenAI's and TGI's /health, SageMaker's /ping."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from moe_ray.api.service import ServedModel


async def health_response(service: ServedModel) -> Response:
    """200 once a trunk and every expert are up, else 503 naming what is missing."""
    missing = await service.missing()
    if missing is None:
        return JSONResponse({"status": "ok"})
    says = {"status": "not ready", "missing": missing, "error": "unhealthy", "error_type": "healthcheck"}
    return JSONResponse(says, 503, {"Retry-After": str(service.options.retry_after_s)})
