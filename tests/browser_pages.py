"""The chat app's pages in a headless Chromium: fixtures, and what a user does on every page.

Its fixtures are those of every test: conftest.py names it as a plugin. Screenshots go to the folder
that SCREENSHOTS names, if it does.
"""

import os
import shutil
from functools import cache
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
MARKS = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH"
    ),
]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
WIDTHS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture(scope="module")
def context_of(browser):
    """A browser of a width and a colour scheme.

    Its pages share what it keeps of a server's files, which take seconds to read.
    """

    @cache
    def context_of(width: str, scheme: str):
        context = browser.new_context(
            viewport=WIDTHS[width], color_scheme=scheme, accept_downloads=True
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        return context

    return context_of


@pytest.fixture
def visit(context_of):
    """Opens the page of a server.

    What it asked of other hosts and what broke in it fail the test.
    """
    pages = []

    def open_page(url: str, width: str = "desktop", scheme: str = "light", loaded: str = "rank 16"):
        page = context_of(width, scheme).new_page()
        page.asked, page.broke = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.broke.append(str(error)))
        page.on("dialog", lambda dialog: page.broke.append(f"dialog {dialog.message}"))
        page.set_default_timeout(30_000)
        page.goto(url)
        pages.append((page, url))
        page.get_by_text(loaded).first.wait_for()
        return page

    yield open_page
    for page, url in pages:
        outside = [asked for asked in page.asked if not asked.startswith((url, "data:", "blob:"))]
        assert not outside
        assert not page.broke
        page.close()


def shot(page, name: str) -> None:
    if os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(300)
        page.screenshot(path=str(Path(os.environ["SCREENSHOTS"]) / f"{name}.png"), full_page=True)


def say(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.get_by_role("button", name="Send").click()


def answered(page, column: str = "left", says: str = ""):
    """The footnote of the newest answer, once it says that and the page takes messages again."""
    footnote = page.locator(f"#{column} .bot .thought", has_text=says).last
    footnote.wait_for()
    page.get_by_role("button", name="Send").wait_for()
    return footnote.inner_text()


def slide(page, label: str, value: str) -> None:
    page.get_by_label(f"number input for {label}").fill(value)
    page.get_by_label(f"number input for {label}").press("Enter")
