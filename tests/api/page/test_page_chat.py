"""The page in a real browser over a real engine: chatting, tokens and their experts, errors, keys, keyboard."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browser import ENDED, ask, needs_browser, open_page, wait_ready
from house_in_process import HouseInProcess, page_server
from in_process import Trunk
from playwright.sync_api import Browser, Page
from served import eventually

from moe_ray.api.service import HttpOptions
from moe_ray.errors import ExpertUnavailable

pytestmark = [needs_browser, pytest.mark.slow]  # seconds of a core each

VALUES = {"temperature": 0, "max_tokens": 12}
ROUTED = {"system": "", "stop": "", "routing": True, "values": VALUES}
LONG = {**ROUTED, "routing": False, "values": {"temperature": 0, "max_tokens": 300}}
ANSWER = ".message.answer"
FAULT = ".fault:not([hidden])"


def stored(settings: dict[str, Any]) -> dict[str, str]:
    return {"moe-ray.settings": json.dumps(settings)}


def chats(page: Page) -> list[dict[str, Any]]:
    """The conversations in the browser's storage."""
    found = page.evaluate(
        "Object.entries(localStorage).filter(([k]) => k.startsWith('moe-ray.chat.')).map(([, v]) => v)"
    )
    return [json.loads(each) for each in found]


def asked_directly(url: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The same answer from the API, whole."""
    body = {"messages": messages, **VALUES, "return_routed_experts": True}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_and_the_experts_of_each_of_its_tokens(browser: Browser, url: str) -> None:
    with open_page(browser, url, stored(ROUTED)) as page:
        wait_ready(page)
        ask(page, "Name a river.")
        whole = asked_directly(url, [{"role": "user", "content": "Name a river."}])
        (choice,), usage = whole["choices"], whole["usage"]
        (chat,) = chats(page)
        question, answer = chat["messages"]
        assert (question["role"], question["content"]) == ("user", "Name a river.")
        assert answer["content"] == choice["message"]["content"]
        assert answer["facts"]["tokens"] == usage["completion_tokens"]
        facts = page.inner_text(f"{ANSWER} .facts")
        assert facts.startswith("12 tokens")
        assert "first after" in facts

        rows = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
        page.click("[aria-label='Inspect tokens']")
        tokens = page.locator(".token")
        assert tokens.count() == 12
        for index in (0, 5, 10):
            tokens.nth(index).click()
            position = usage["prompt_tokens"] + index
            assert f"position {position:,}" in page.inner_text("[aria-label='The picked token']")
            told = [each.get_attribute("aria-label") for each in page.locator(".strip li").all()]
            chosen = rows[position].tolist()
            assert told == [
                f"Layer {layer}: experts {' and '.join(map(str, each))}" for layer, each in enumerate(chosen)
            ]
        page.keyboard.press("ArrowRight")
        assert page.locator(".token[aria-pressed=true]").get_attribute("aria-label").startswith("Token 12:")  # type: ignore[union-attr]
        assert "Nothing was computed" in page.inner_text("[aria-label='The picked token']")
        page.click("[aria-label='Inspect tokens']")
        assert page.locator(".token").count() == 0

        page.reload()
        wait_ready(page)
        page.click(".chat-item .open")
        assert page.locator(f"{ANSWER} .prose").inner_text().strip() != ""
        assert page.locator("[aria-label='Inspect tokens']").count() == 0, "routing is not kept"


def test_stop_again_and_edit(browser: Browser, url: str, slow: Trunk) -> None:
    slow.engine.pause_s = 0.03
    with open_page(browser, url, stored(LONG)) as page:
        wait_ready(page)
        page.fill("#prompt", "Tell me")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("a story.")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"{ANSWER} .prose p, {ANSWER} .prose ul, {ANSWER} .prose ol", state="attached")
        page.keyboard.press("Escape")
        page.wait_for_selector(ENDED)
        slow.engine.pause_s = 0.0
        assert "stopped" in page.inner_text(f"{ANSWER} .facts")
        (chat,) = chats(page)
        assert chat["messages"][0]["content"] == "Tell me\na story."
        part = chat["messages"][1]["content"]
        assert part
        assert page.evaluate("document.activeElement.id") == "prompt"

        page.click("[aria-label='Answer again']")
        page.wait_for_selector(f"{ENDED}:not(:has-text('stopped'))")
        whole = chats(page)[0]["messages"][1]["content"]
        assert whole.startswith(part), "greedy: the same words, and more"
        assert len(whole) > len(part)

        page.hover(".message.user")
        page.click("[aria-label='Edit']")
        page.fill("[aria-label='Edit your message']", "Another one.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".bubble >> text=Another one.")
        page.wait_for_selector(ENDED)
        assert [each["content"] for each in chats(page)[0]["messages"] if each["role"] == "user"] == ["Another one."]


def test_settings_are_checked_kept_and_sent(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        wait_ready(page)
        page.click("#open-settings")
        page.get_by_label("Temperature", exact=True).fill("3")
        page.get_by_label("Top p", exact=True).fill("0.9")
        page.get_by_role("button", name="Save").click()
        assert page.get_by_text("between 0 and 2").is_visible()
        page.get_by_label("Temperature", exact=True).fill("0.5")
        page.get_by_label("System prompt", exact=True).fill("Be brief.")
        page.get_by_label("Most tokens", exact=True).fill("4")
        page.get_by_label("Seed", exact=True).fill("7")
        page.get_by_label("Stop strings", exact=True).fill("zzzz\nyyyy")
        page.get_by_label("Record which experts").uncheck()
        page.get_by_role("button", name="Save").click()
        assert "temperature 0.5" in page.inner_text("#settings-summary")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "Hello")
        body = sent.value.post_data_json
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        given = {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed", "stop")}
        assert given == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 4, "seed": 7, "stop": ["zzzz", "yyyy"]}
        assert "return_routed_experts" not in body
        assert "logprobs" not in body
        assert "cut at the most tokens" in page.inner_text(f"{ANSWER} .facts")


def test_errors_are_told_and_can_be_tried_again(browser: Browser, url: str, slow: Trunk) -> None:
    with open_page(browser, url, stored({**ROUTED, "values": {"max_tokens": 6, "top_k": 5}})) as page:
        wait_ready(page)
        slow.engine.error = ExpertUnavailable("no live replica of expert 3 for layer 1")
        page.fill("#prompt", "Hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"{FAULT} >> text=not ready")
        slow.engine.error = None
        page.get_by_role("button", name="Try again").click()
        page.wait_for_selector(f"{ANSWER} .facts >> text=tokens")
        assert [each["role"] for each in chats(page)[0]["messages"]] == ["user", "assistant"]

        page.context.set_offline(True)
        page.fill("#prompt", "Again")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"{FAULT} >> text=connection was lost")
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        page.wait_for_selector(FAULT, state="detached")
        page.wait_for_selector(f"{ENDED} >> nth=1")


def test_a_full_queue_counts_down(browser: Browser, url: str, slow: Trunk) -> None:
    """The trunk computes one request and lets one wait."""
    slow.engine.pause_s = 0.05

    def fill() -> int:
        body = {"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=90, trust_env=False).status_code

    with ThreadPoolExecutor(2) as threads, open_page(browser, url) as page:
        wait_ready(page)
        others = [threads.submit(fill)]
        eventually(lambda: slow.runtime.stats().num_running == 1)
        others.append(threads.submit(fill))
        eventually(lambda: slow.runtime.stats().num_waiting == 1)
        page.fill("#prompt", "Hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"{FAULT} >> text=busy")
        assert "Try again" in page.inner_text(f"{FAULT} button")
        slow.engine.pause_s = 0.0
        assert [other.result() for other in others] == [200, 200]
        page.get_by_role("button", name="Try again", exact=True).click()
        page.wait_for_selector(FAULT, state="detached")
        page.wait_for_selector(ENDED)


def test_conversations(browser: Browser, url: str, tmp_path: Path) -> None:
    with open_page(browser, url, stored({**ROUTED, "values": {"max_tokens": 2}})) as page:
        wait_ready(page)
        ask(page, "First")
        page.click("#new-chat")
        ask(page, "Second <b>one</b>")
        assert page.locator(".chat-item .open").all_inner_texts() == ["Second <b>one</b>", "First"]
        page.get_by_label("Rename First").click()
        page.keyboard.type("Renamed")
        page.keyboard.press("Enter")
        assert "Renamed" in page.locator(".chat-item .open").all_inner_texts()
        with page.expect_download() as download:
            page.click("#export")
        file = tmp_path / "chats.json"
        download.value.save_as(file)
        page.on("dialog", lambda dialog: dialog.accept())
        for name in ("Renamed", "Second <b>one</b>"):
            page.get_by_label(f"Delete {name}").click()
        assert chats(page) == []
        assert page.is_visible("#empty")
        page.set_input_files("#import-file", file)
        page.wait_for_selector(".chat-item >> nth=1")
        page.click(".chat-item .open >> text=Renamed")
        assert page.inner_text(".bubble") == "First"


def test_keys_are_asked_for_and_stay_in_the_tab(browser: Browser, kernel_model: Path, trunk: Trunk) -> None:
    house = HouseInProcess(kernel_model, trunk)
    with (
        page_server(kernel_model, trunk, HttpOptions(api_keys=("the-key",)), house) as url,
        open_page(browser, url, stored(ROUTED)) as page,
    ):
        page.wait_for_selector("dialog[open]")
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open] >> text=not one of the server's")
        page.get_by_role("textbox", name="API key").fill("the-key")
        page.keyboard.press("Enter")
        page.wait_for_selector(".expert")
        ask(page, "Hello")
        assert page.locator(ANSWER).count() == 1
        assert "the-key" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_house_is_looked_at_once_for_all_and_only_while_seen(
    browser: Browser, url: str, house: HouseInProcess
) -> None:
    with open_page(browser, url, stored(ROUTED)) as page, open_page(browser, url):
        wait_ready(page)
        ask(page, "Name a river.")
        page.wait_for_selector(".expert")
        assert page.locator(".expert").count() == 8
        page.wait_for_selector(".heat[aria-label*='busiest is expert']")
        page.click(".expert-open >> nth=2")
        assert "on cpu" in page.inner_text("#replicas-2")
        assert page.locator("#replicas-2 .kill").is_hidden(), "this house may not be changed"
        before = house.looks
        page.wait_for_timeout(1500)
        assert 1 <= house.looks - before <= 3, "two pages, one look a second"
        page.click("#toggle-house")
        with pytest.raises(Exception, match="Timeout"), page.expect_request("**/house", timeout=1600):
            pass
        assert not page.is_visible("#house")


def test_keyboard_and_focus(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        wait_ready(page)
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.focus(".skip")
        box = page.locator(".skip").bounding_box()
        assert box is not None
        assert box["y"] >= 0, "it can be seen while it has the focus"
        assert page.evaluate("document.querySelector('a, button, input, textarea, [tabindex]').className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.press("Shift+Enter")
        page.keyboard.press("Enter")
        assert page.is_visible("#empty"), "blank messages are not sent"
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "open-settings"
        assert page.evaluate(outline) == "solid"


def test_a_phone(browser: Browser, url: str) -> None:
    phone: dict[str, Any] = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}
    with open_page(browser, url, stored({**ROUTED, "values": {"max_tokens": 8}}), **phone) as page:
        wait_ready(page)
        page.tap("#prompt")
        page.fill("#prompt", "A long word: " + "m" * 90)
        page.tap("#send")
        page.wait_for_selector(f"{ANSWER} .facts", state="attached")
        for part in ("html", "#scroll"):
            assert not page.evaluate(f"document.querySelector('{part}').scrollWidth > innerWidth"), part
        page.tap("#tab-house")
        page.wait_for_selector(".expert")
        assert not page.is_visible("#composer")
        assert not page.evaluate("document.querySelector('#house').scrollWidth > innerWidth")
        page.tap("#open-chats")
        page.wait_for_selector(".chat-item", state="visible")
        page.tap(".chat-item .open")
        assert page.is_visible("#composer")
