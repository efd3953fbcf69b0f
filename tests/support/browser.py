"""Debian's Chromium for tests of the page, driven by playwright: a visit notes whatever a page must never do.

Rules: no browser is downloaded; at a visit's end there was no error in the console, no request to another address and
nothing that the Content-Security-Policy had to refuse. Screenshots go to the folder SCREENSHOTS names, else to the
test's own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
NARROW, WIDE = 360, 1100
_REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")
_NOTE_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation",
                 (event) => violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@contextmanager
def launched() -> Iterator[Browser]:
    """A running Chromium; fails with what to install where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(f"None of {', '.join(NAMES)} is on PATH: sudo apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Visit:
    """One look at the page, in a fresh browser profile.

    Args:
        language: as the browser tells it, for example `zh-CN`; scheme: `light` or `dark`; width: in CSS pixels.
        refusals: HTTP statuses that this visit will see; the browser itself notes each as an error.
    """

    def __init__(self, browser: Browser, url: str, language: str = "en-US", scheme: Any = "light", width: int = WIDE,
                 refusals: tuple[int, ...] = ()) -> None:
        self.url, self._refusals = url, refusals
        self.context = browser.new_context(locale=language, color_scheme=scheme, reduced_motion="reduce",
                                           viewport={"width": width, "height": 800})
        self.context.set_default_timeout(10_000)
        self.context.add_init_script(_NOTE_VIOLATIONS)
        self.errors: list[str] = []
        self.strangers: list[str] = []
        self.addresses: list[str] = []
        self.context.on("page", self._watch)
        self.page = self.context.new_page()
        self.page.goto(url)

    def _watch(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        refused = _REFUSED.match(message.text)
        if message.type in ("error", "warning") and not (refused and int(refused[1]) in self._refusals):
            self.errors.append(message.text)

    def _request(self, request: Request) -> None:
        self.addresses.append(request.url)
        if not request.url.startswith(f"{self.url}/"):
            self.strangers.append(request.url)

    def text(self, selector: str) -> str:
        """What is seen of an element."""
        return self.page.locator(selector).inner_text()

    def wait_for(self, selector: str, text: str, seconds: float = 10) -> None:
        """Wait until an element holds a text and is seen."""
        self.page.locator(selector, has_text=text).first.wait_for(state="visible", timeout=seconds * 1000)

    def use_key(self, key: str) -> None:
        """Type the key and send it."""
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Use this key").click()

    def ask(self, text: str) -> None:
        """Type a message and press Enter."""
        self.page.get_by_label("Your message").fill(text)
        self.page.keyboard.press("Enter")

    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))

    def complaints(self) -> list[str]:
        """What axe-core finds, by rule and element."""
        violations = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {node['target']} {node['failureSummary']}" for each in violations
                for node in each["nodes"]]

    def close(self, clean: bool = True) -> None:
        """End it; fails when the page did what it must not."""
        violations = self.page.evaluate("violations")
        self.context.close()
        if clean:
            assert (self.errors, self.strangers, violations) == ([], [], [])


Visits = Callable[..., Visit]
