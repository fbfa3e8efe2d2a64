"""The page's routes without a browser: who gets what, headers, keys, and what a request that changes must bring."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from browser import static_files

from moe_ray.api.http import build_app
from moe_ray.api.page.control import HEADER
from moe_ray.api.page.files import page_files
from moe_ray.api.page.house import FRESH_S, Glance
from moe_ray.api.service import HttpOptions, ServedModel
from moe_ray.errors import InvalidRequest
from moe_ray.gateway.sessions import Sessions
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.transport.base import LinkOptions

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
KEY = {"Authorization": "Bearer the-key"}
JSON = {"Content-Type": "application/json", HEADER: "1"}


class NoReplicas:
    """A house that may be changed and has nothing to change: what comes through is refused by it, with 400."""

    def __init__(self, control: bool = True) -> None:
        self.control = control

    async def look(self) -> dict[str, Any]:
        return {"trunks": [], "experts": []}

    async def scale(self, expert: int, replicas: int | None) -> None:
        raise InvalidRequest(f"no expert {expert} for {replicas}", "expert")

    async def kill(self, replica_id: str) -> None:
        raise InvalidRequest(f"no replica {replica_id}", "replica_id")


def application(tokenizer: Tokenizer, house: NoReplicas | None = None, **options: Any) -> Any:
    async def nothing() -> list[Any]:
        return []

    async def load() -> dict[str, Any]:
        return {}

    return build_app(ServedModel("m", tokenizer, Sessions(nothing, LinkOptions()), HttpOptions(**options)), load, house)


@pytest.fixture(scope="module")
def tokenizer(readable_model: Any) -> Tokenizer:
    return Tokenizer(readable_model)


def ask(
    app: Any, *requests: tuple[str, str, dict[str, Any]], root: str = "", host: str = "127.0.0.1:8000"
) -> list[Any]:
    """The responses to (method, path, arguments of httpx) each."""

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(all_of_them())


def test_browsers_get_the_page_and_programs_the_health(tokenizer: Tokenizer) -> None:
    app = application(tokenizer)
    page, program, head, post = ask(
        app,
        ("GET", "/", {"headers": BROWSER}),
        ("GET", "/", {}),
        ("HEAD", "/", {"headers": BROWSER}),
        ("POST", "/", {}),
    )
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.startswith("<!doctype html>")
    assert "<base" not in page.text
    assert (program.status_code, program.json()["missing"]) == (503, ["Trunk"])
    assert (head.status_code, head.content) == (200, b"")
    assert post.json()["error_type"] == "validation", "TGI's"


def test_every_file_goes_out_with_a_strict_policy_and_once(tokenizer: Tokenizer) -> None:
    app = application(tokenizer)
    names = [path.name for path in static_files()]
    assert sorted(page_files()) == names, "every file of the folder is served, and nothing else"
    paths = ["/", *[f"/page/{name}" for name in names if name != "index.html"]]
    for response in ask(app, *[("GET", path, {"headers": BROWSER}) for path in paths]):
        assert response.status_code == 200, response.url
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = {**BROWSER, "If-None-Match": response.headers["etag"]}
        (unchanged,) = ask(app, ("GET", response.url.path, {"headers": again}))
        assert (unchanged.status_code, unchanged.content) == (304, b"")
    for path in ("/page/index.html", "/page/routes.py", "/page/..%2froutes.py", "/page/none.js"):
        assert ask(app, ("GET", path, {"headers": BROWSER}))[0].status_code == 404


def test_nothing_in_the_files_points_elsewhere() -> None:
    for path in static_files():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            'style="',
        ):
            assert word not in text, f"{path.name} has {word}"
        assert len(text.splitlines()) <= 300, path.name


def test_below_a_prefix_links_begin_there(tokenizer: Tokenizer) -> None:
    app = application(tokenizer)
    for path in ("/served", "/served/"):
        (page,) = ask(app, ("GET", path, {"headers": BROWSER}), root="/served")
        assert page.status_code == 200, path
        assert '<base href="/served/">' in page.text
    (odd,) = ask(app, ("GET", '/a"><b/', {"headers": BROWSER}), root='/a"><b')
    assert "<b/" not in odd.text


def test_with_keys_the_page_is_open_and_its_data_is_not(tokenizer: Tokenizer) -> None:
    app = application(tokenizer, NoReplicas(), api_keys=("the-key",))
    page, file, *closed = ask(
        app,
        ("GET", "/", {"headers": BROWSER}),
        ("GET", "/page/main.js", {}),
        ("GET", "/", {}),
        ("GET", "/house", {"headers": BROWSER}),
        ("POST", "/house/scale", {"headers": JSON}),
        ("POST", "/house/kill", {"headers": JSON}),
        ("POST", "/page/main.js", {}),
        ("POST", "/", {"headers": BROWSER}),
    )
    assert page.status_code == file.status_code == 200
    assert [response.status_code for response in closed] == [401] * 6
    house, changed = ask(
        app,
        ("GET", "/house", {"headers": KEY}),
        ("POST", "/house/kill", {"headers": {**JSON, **KEY}, "json": {"replica_id": "x"}}),
    )
    assert house.json() == {"trunks": [], "experts": []}
    assert changed.status_code == 400


def test_without_a_page_nothing_of_it_is_there(tokenizer: Tokenizer) -> None:
    app = application(tokenizer, NoReplicas(), page=False)
    for path in ("/page/main.js", "/house"):
        assert ask(app, ("GET", path, {"headers": BROWSER}))[0].status_code == 404
    assert ask(app, ("GET", "/", {"headers": BROWSER}))[0].status_code == 503, "as for programs"
    app = application(tokenizer, NoReplicas(control=False))
    assert ask(app, ("GET", "/house", {}))[0].status_code == 200
    for path in ("/house/scale", "/house/kill"):
        assert ask(app, ("POST", path, {"headers": JSON, "json": {}}))[0].status_code == 404


def test_a_request_that_changes_comes_from_the_page_itself(tokenizer: Tokenizer) -> None:
    app = application(tokenizer, NoReplicas())
    body = {"json": {"expert": 1, "replicas": 2}}

    def status(headers: dict[str, str], host: str = "127.0.0.1:8000", app: Any = app) -> int:
        (response,) = ask(app, ("POST", "/house/scale", {"headers": headers, **body}), host=host)
        if response.status_code == 403:
            assert response.json()["error"]["type"] == "permission_error"
        return response.status_code

    own = {**JSON, "Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert status(own) == status(JSON) == 400, "the house refused it, not the gateway"
    assert status({**JSON, "Content-Type": "text/plain"}) == 403
    assert status({"Content-Type": "application/json"}) == 403
    assert status({**own, "Origin": "http://evil.example"}) == 403
    assert status({**own, "Origin": "null"}) == 403
    assert status({**own, "Sec-Fetch-Site": "cross-site"}) == 403
    rebound = {**JSON, "Origin": "http://evil.example:8000"}
    assert status(rebound, host="evil.example:8000") == 403, "a foreign name that points here"
    assert status(JSON, host="[::1]:8000") == status(JSON, host="localhost:8000") == 400
    keyed = application(tokenizer, NoReplicas(), api_keys=("the-key",))
    assert status({**rebound, **KEY, "Origin": "http://moe.example"}, host="moe.example", app=keyed) == 400


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("scale", {"expert": -1, "replicas": 2}, "expert"),
        ("scale", {"expert": 1, "replicas": 0}, "replicas"),
        ("scale", {"expert": "1", "replicas": 2}, "expert"),
        ("scale", {"expert": 1}, "replicas"),
        ("scale", {"expert": 1, "replicas": 2, "more": 1}, "more"),
        ("kill", {"replica_id": 3}, "replica_id"),
        ("kill", {}, "replica_id"),
        ("kill", [], None),
    ],
)
def test_a_wrong_body_is_told_by_field(tokenizer: Tokenizer, path: str, body: Any, param: str | None) -> None:
    (response,) = ask(application(tokenizer, NoReplicas()), ("POST", f"/house/{path}", {"headers": JSON, "json": body}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_one_look_answers_all_who_ask_within_a_second() -> None:
    looks, now = 0, 0.0

    async def look() -> dict[str, Any]:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0)
        return {"look": looks}

    async def watch() -> None:
        nonlocal now
        glance = Glance(look, lambda: now)
        assert await asyncio.gather(*[glance() for _ in range(50)]) == [{"look": 1}] * 50
        now += FRESH_S / 2
        assert await glance() == {"look": 1}
        now += FRESH_S / 2
        assert await asyncio.gather(glance(), glance()) == [{"look": 2}] * 2
        glance.forget()
        assert await glance() == {"look": 3}

    asyncio.run(watch())
