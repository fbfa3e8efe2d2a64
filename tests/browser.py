"""Chromium, as Debian packages it, without a window; and what every page of ours must do in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="Debian's package chromium is not installed (`make browser`)"
)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser; a root user's has no sandbox of its own."""
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(browser: Browser, url: str, storage: dict[str, str] | None = None, **context: Any) -> Iterator[Page]:
    """A page in a context of its own. In the end: no error was thrown, and no request went anywhere else.

    `storage`: what its localStorage holds before it begins.
    """
    options = {"viewport": {"width": 1400, "height": 860}, "reduced_motion": "reduce", **context}
    inside = browser.new_context(**options)
    faults: list[str] = []
    asked: set[str] = set()
    if storage:
        items = "".join(
            f"localStorage.getItem({key!r}) ?? localStorage.setItem({key!r}, {value!r});"
            for key, value in storage.items()
        )
        inside.add_init_script(items)
    page = inside.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Security Policy" in said.text else None)
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    page.goto(url)
    try:
        yield page
    finally:
        inside.close()
    assert not faults
    assert asked - {""} == {urlsplit(url).netloc}, "a request went to another server"


def wait_ready(page: Page) -> None:
    """Wait until the page says that the model is ready."""
    page.wait_for_selector("#health[data-state=ready]", state="attached")


ENDED = ".answer .foot:not([hidden])"
"""The foot of an answer that has ended, well or not."""


def ask(page: Page, text: str) -> None:
    """Send a message and wait until its answer has ended."""
    before = page.locator(ENDED).count()
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{ENDED} >> nth={before}")


def call(page: Page, file: str, expression: str, *arguments: Any) -> Any:
    """Evaluate a function of a module of the page: `call(page, "npy.js", "m.parseNpy(...)", …)`; `m`: the module, `a`:
    the arguments.
    """
    script = (
        f"async (a) => {{ const m = await import(new URL('page/{file}', document.baseURI)); return ({expression}); }}"
    )
    return page.evaluate(script, list(arguments))


def static_files() -> list[Path]:
    """The page's files."""
    import moe_ray

    return sorted((Path(moe_ray.__file__).parent / "api/page/static").iterdir())
