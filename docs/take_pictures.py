"""Takes the pictures of the page in docs/pictures, of a server that runs: `python docs/take_pictures.py [URL]`.

Needs Debian's chromium, and the fonts Inter and JetBrains Mono to look as they do here (fonts-inter,
fonts-jetbrains-mono). The answers are the demo model's own.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).with_name("pictures")
QUESTION = "What are three good habits for learning a language? Answer with a short list."
SETTINGS = {"routing": True, "values": {"temperature": 0, "max_tokens": 200}}
DESK = {"viewport": {"width": 1380, "height": 860}, "device_scale_factor": 1.3}
PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 1.3, "is_mobile": True, "has_touch": True}


def opened(browser: Browser, url: str, **look: Any) -> Page:
    """The page, ready, in its own context."""
    context = browser.new_context(**look)
    context.add_init_script(f"localStorage.setItem('moe-ray.settings', {json.dumps(json.dumps(SETTINGS))})")
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_selector("#health[data-state=ready]", state="attached")
    return page


def ask(page: Page, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop", state="visible")
    page.wait_for_selector("#stop", state="hidden")


def few_colours(picture: Image.Image) -> Image.Image:
    """The picture in 256 colours: those of large areas, and those of small dots, too."""
    areas = picture.quantize(192, Image.Quantize.MEDIANCUT, kmeans=4).getpalette() or []
    dots = picture.quantize(64, Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*areas[: 3 * 192], *dots[: 3 * 64]])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def keep(page: Page, name: str) -> None:
    """Write what can be seen as docs/pictures/NAME.png."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.png"
    few_colours(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size // 1000} kB")


def main(url: str) -> None:
    """Take all pictures of the page at `url`."""
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=options)
        page = opened(browser, url, color_scheme="light", **DESK)
        ask(page, "What is the capital of France?")
        page.fill("#prompt", QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer:nth-last-child(1) .prose li:nth-child(2)", state="attached")
        keep(page, "chat")
        page.wait_for_selector("#stop", state="hidden")
        page.click("#theme")
        page.locator("[aria-label='Inspect tokens']").last.click()
        page.locator(".token").nth(9).click()
        page.wait_for_timeout(400)
        keep(page, "tokens")
        page = opened(browser, url, color_scheme="light", **PHONE)
        ask(page, "What is the capital of France?")
        page.tap("#tab-house")
        page.wait_for_selector(".expert")
        page.wait_for_timeout(1200)
        keep(page, "phone")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
