"""Debian's Chromium for tests of the page, controlled by playwright.

Rules: no browser is downloaded; an error in the console, a request to another address or a violation of the
Content-Security-Policy fails the test. Screenshots go to the folder SCREENSHOTS, or to the folder of the test.
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
    """Launch Chromium; fail with the command that installs it if it is missing."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail(f"None of {', '.join(NAMES)} is on PATH: sudo apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program)
        yield browser
        browser.close()


class Visit:
    """One visit of the page, in a fresh browser profile.

    Args:
        language: that the browser sends, for example `zh-CN`; scheme: `light` or `dark`; width: in CSS pixels.
        refusals: expected HTTP error statuses; the browser logs each as an error.
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
        """Return the visible text of an element."""
        return self.page.locator(selector).inner_text()

    def wait_for(self, selector: str, text: str, seconds: float = 10) -> None:
        """Wait until an element with this text is visible."""
        self.page.locator(selector, has_text=text).first.wait_for(state="visible", timeout=seconds * 1000)

    def use_key(self, key: str) -> None:
        """Enter the key."""
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Use this key").click()

    def ask(self, text: str) -> None:
        """Send a message with Enter."""
        self.page.get_by_label("Your message").fill(text)
        self.page.keyboard.press("Enter")

    def scrolls_sideways(self) -> bool:
        """Return True if the page is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))

    def complaints(self) -> list[str]:
        """Return the violations that axe-core reports, by rule and element."""
        violations = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {node['target']} {node['failureSummary']}" for each in violations
                for node in each["nodes"]]

    def close(self, clean: bool = True) -> None:
        """Close the page; fail if it did something forbidden."""
        violations = self.page.evaluate("violations")
        self.context.close()
        if clean:
            assert (self.errors, self.strangers, violations) == ([], [], [])


Visits = Callable[..., Visit]
