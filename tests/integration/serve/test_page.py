"""The page in a real browser: type, generate, stop, see an error. Skipped if Chromium is not installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from support.serving import Served, serving
from support.text_model import write_text_models

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(write_text_models(tmp_path_factory.mktemp("text")), seed=1) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, which must not complain in the browser's console, as it would of what its policy forbids."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("stacked-1")
    yield page
    page.close()
    assert [one for one in complaints if "400 (Bad Request)" not in one] == []


def test_a_prompt_is_continued_as_by_the_api(page: Page, served: Served) -> None:
    page.get_by_label("Prompt").fill("the sum")
    page.get_by_label("tokens").fill("40")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^\d+ tokens in [\d.]+ s, seed 1, finish reason:"))
    asked = {"model": "stacked-1", "prompt": "the sum", "max_tokens": 40, "temperature": 0.8}
    text = served.client().completions.create(**asked, extra_body={"top_k": 50}).choices[0].text
    assert page.locator("#text").text_content() == text
    page.get_by_label("seed").fill("2")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"seed 2"))
    assert page.locator("#text").text_content() not in ("", text)


def test_it_can_be_stopped_and_says_what_is_wrong(page: Page, served: Served) -> None:
    page.evaluate("document.forms[0].noValidate = true")
    page.get_by_label("tokens").fill(str(2**20))
    page.get_by_label("top k").fill("1")
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#text")).not_to_be_empty()
    stop.click()
    expect(page.get_by_role("status")).to_have_text("stopped")
    page.get_by_label("top p").fill("0")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_have_text("top_p: 0.0 is not allowed; it must be > 0 and <= 1")
    expect(stop).to_be_disabled()
