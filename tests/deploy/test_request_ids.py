"""The id of a request behind Ray Serve's proxy, which tells it as well."""

from __future__ import annotations

import httpx
from served import Served

REQUEST_ID = "asked-by-a-test"


def test_serve_tells_the_id_of_a_request_once(served_random: Served) -> None:
    with httpx.Client(base_url=served_random.url, timeout=60, trust_env=False) as client:
        for path, status in (("/v1/models", 200), ("/nowhere", 404)):
            response = client.get(path, headers={"X-Request-Id": REQUEST_ID})
            assert response.status_code == status
            assert response.headers.get_list("x-request-id") == [REQUEST_ID]
        assert len(client.get("/health").headers.get_list("x-request-id")) == 1
