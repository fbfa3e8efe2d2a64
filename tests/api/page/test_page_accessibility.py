"""axe-core finds nothing that would keep somebody from using the page, however it looks at the time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import ask, needs_browser, open_page, wait_ready
from playwright.sync_api import Browser, Page

pytestmark = [needs_browser, pytest.mark.slow]  # seconds of a core each

SETTINGS = {"moe-ray.settings": json.dumps({"routing": True, "values": {"temperature": 0, "max_tokens": 12}})}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 780}},
}


def grave(page: Page) -> list[str]:
    """What axe-core calls serious or critical, a line or more each."""
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{each['id']} ({each['impact']}): {each['help']}\n  "
        + "\n  ".join(node["html"][:160] for node in each["nodes"][:4])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def check(page: Page, where: str) -> None:
    found = grave(page)
    assert not found, f"{where}:\n" + "\n".join(found)


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_serious(browser: Browser, url: str, look: str) -> None:
    with open_page(browser, url, SETTINGS, bypass_csp=True, **LOOKS[look]) as page:
        wait_ready(page)
        check(page, "empty")
        ask(page, "Name a river.")
        page.click("[aria-label='Inspect tokens']")
        if look == "phone":
            page.click("#tab-house")
        page.click(".expert-open >> nth=0")
        check(page, "an answer as tokens, and the house")
        if look == "phone":
            page.click("#tab-chat")
        page.click("#open-settings")
        check(page, "settings")


def test_what_is_bad_would_be_found(browser: Browser, url: str) -> None:
    with open_page(browser, url, bypass_csp=True) as page:
        wait_ready(page)
        page.evaluate(
            "document.querySelector('#main').append(document.createElement('img'), document.createElement('input'))"
        )
        assert {each.split()[0] for each in grave(page)} == {"image-alt", "label"}
