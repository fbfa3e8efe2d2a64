"""The page over a served application: an expert is killed while it answers, and another one gets a replica."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import pytest
from browser import ENDED, needs_browser, open_browser, open_page, wait_ready
from playwright.sync_api import Page
from served import Served, by_hand, eventually, statuses
from served import wait_ready as wait_served

pytestmark = needs_browser

T = TypeVar("T")

HEADERS = {"X-Moe-Ray-Page": "1"}
VALUES = {"temperature": 0, "max_tokens": 90}
QUESTION = "Write a story about a lighthouse keeper."


@pytest.fixture(scope="module")
def page(served_demo: Served) -> Iterator[Page]:
    settings = {"moe-ray.settings": json.dumps({"routing": True, "values": VALUES})}
    with open_browser() as browser, open_page(browser, served_demo.url, settings) as opened:
        opened.set_default_timeout(90_000)
        wait_ready(opened)
        opened.wait_for_selector(".expert .dot[data-state=running]")
        yield opened
    wait_served(served_demo.url)


def aside(function: Callable[..., T], *arguments: Any) -> T:
    """Call on another thread: the browser's loop runs on this one, and Serve's handles refuse to wait beside a loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def processes(served: Served) -> set[int]:
    """Of all experts."""
    return {each["pid"] for expert in range(8) for each in aside(statuses, served, f"Expert{expert}")}


def replicas(served: Served, expert: int) -> list[dict[str, str]]:
    house = httpx.get(f"{served.url}/house", timeout=30, trust_env=False).json()
    found: list[dict[str, str]] = house["experts"][expert]["replicas"]
    return found


def test_an_answer_goes_on_after_its_busiest_expert_was_killed(page: Page, served_demo: Served) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], **VALUES}
    whole = httpx.post(f"{served_demo.url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
    before = processes(served_demo)
    page.fill("#prompt", QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .prose p", state="attached")
    page.get_by_role("button", name="Kill the busiest expert").click()
    page.wait_for_selector(".events >> text=killed by you")
    page.wait_for_selector(ENDED)
    assert page.locator(".fault:visible").count() == 0
    stored = "Object.entries(localStorage).filter(([k]) => k.startsWith('moe-ray.chat.')).map(([, v]) => v)"
    (chat,) = map(json.loads, page.evaluate(stored))
    assert chat["messages"][1]["content"] == whole["choices"][0]["message"]["content"], "the very same words"
    page.wait_for_selector(".events [data-kind=good] >> text=serves")
    wait_served(served_demo.url)
    assert len(before - processes(served_demo)) == 1, "one process is gone, and was replaced"


def test_an_expert_gets_a_replica_and_loses_it(page: Page, served_demo: Served) -> None:
    try:
        page.get_by_label("One replica more of expert 1").click()
        two = ".expert:nth-child(2) .dots .dot[data-state=running] + .dot[data-state=running]"
        page.wait_for_selector(two)
        assert [each["state"] for each in replicas(served_demo, 1)] == ["running", "running"]
        page.get_by_label("One replica less of expert 1").click()
        eventually(lambda: len(replicas(served_demo, 1)) == 1, timeout_s=60, every_s=0.5)
    finally:
        aside(by_hand, served_demo, [1], None)


def test_what_cannot_be_is_told(served_demo: Served) -> None:
    def status(path: str, body: object) -> tuple[int, str]:
        response = httpx.post(
            f"{served_demo.url}/house/{path}", json=body, headers=HEADERS, timeout=30, trust_env=False
        )
        return response.status_code, response.json()["error"]["param"]

    assert status("scale", {"expert": 8, "replicas": 2}) == (400, "expert")
    assert status("scale", {"expert": 0, "replicas": 1000}) == (400, "replicas")
    assert status("kill", {"replica_id": "SERVE_REPLICA::demo#Expert0#none"}) == (400, "replica_id")
    gateway = httpx.get(f"{served_demo.url}/house", timeout=30, trust_env=False).json()["trunks"][0]["replica_id"]
    assert status("kill", {"replica_id": gateway.replace("#Trunk#", "#Gateway#")}) == (400, "replica_id")
