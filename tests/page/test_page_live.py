"""The console page in a real browser on the real appliance: pull, chat, and restart of a dead engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Route, expect

from fakes.hub import Hub
from shoehorn.runtime.state import StateFile
from support.browser import Visit, Visits
from support.running import DEMO_MODEL, Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.browser

CHAT = "**/v1/chat/completions"
NAME = "What is your name?"


def ask_for_long(seen: Visit) -> None:
    """Send a message whose answer lasts: the demo model's own are over within a moment."""
    def lengthen(route: Route) -> None:
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True, "n": 64})

    seen.page.route(CHAT, lengthen)
    seen.ask("Describe Shoehorn.")
    expect(seen.page.locator(".assistant .text")).not_to_be_empty(timeout=30_000)
    seen.page.unroute(CHAT)


def listens(own: Appliance) -> bool:
    try:
        return httpx.get(f"{own.url}/status").status_code == 200
    except httpx.TransportError:
        return False


def test_invalid_key_is_rejected_and_a_valid_one_chats(appliance: Appliance, visit: Visits) -> None:
    seen = visit(appliance.url, refusals=(401,))
    seen.wait_for("#chat-title", "Chat")
    seen.use_key("sk-wrong")
    expect(seen.page.locator("#key-error")).to_contain_text("This key was refused.")
    expect(seen.page.locator("#key-error")).to_contain_text("Incorrect API key provided.")
    expect(seen.page.get_by_label("API key")).to_be_focused()
    assert seen.page.get_by_label("API key").input_value() == "sk-wrong", "it may lack one character only"
    seen.use_key(appliance.key)
    expect(seen.page.get_by_label("Your message")).to_be_focused()
    seen.ask(NAME)
    expect(seen.page.locator("#activity")).to_have_text("Response complete.", timeout=60_000)
    assert "Shoehorn" in seen.text(".assistant .text")
    assert float(seen.text("#speed").split()[0]) > 0
    used, limit = (int(word.replace(",", "")) for word in seen.text("#context").split() if word[0].isdigit())
    assert 0 < used < limit == 2048
    assert seen.page.get_by_role("meter").evaluate("meter => meter.value") == used


def test_answer_streams_and_stop_frees_the_engine(appliance: Appliance,
                                                                                   visit: Visits) -> None:
    seen = visit(appliance.url)
    seen.use_key(appliance.key)
    drawn = seen.page.evaluate_handle("""() => {
        const lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector(".assistant .text")?.textContent.length))
            .observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});
        return lengths;
    }""")
    ask_for_long(seen)
    wait_until(lambda: drawn.evaluate("lengths => lengths.size") > 3, 30, "it is drawn piece by piece")
    stop = seen.page.get_by_role("button", name="Stop")
    stop.click()
    expect(seen.page.locator(".assistant .note")).to_have_text("Stopped.")
    expect(stop).to_be_hidden()
    answer = seen.text(".assistant .text")
    assert answer
    seen.page.get_by_role("button", name="New conversation").click()
    seen.ask(NAME)
    expect(seen.page.locator("#activity")).to_have_text("Response complete.", timeout=60_000)
    assert "Shoehorn" in seen.text(".assistant .text")


@pytest.mark.parametrize("name", ["curl", "openai", "langchain"])
def test_copied_snippets_run(appliance: Appliance, visit: Visits, name: str, tmp_path: Path) -> None:
    seen = visit(appliance.url)
    seen.context.grant_permissions(["clipboard-read", "clipboard-write"])
    seen.wait_for("#use-title", "Use the API")
    if name != "curl":
        seen.page.locator("summary", has_text=f"Python, {name}").first.click()
    seen.page.locator(f"[data-copy={name}]").click()
    expect(seen.page.locator(f"[data-copy={name}]")).to_have_text("Copied")
    text = str(seen.page.evaluate("navigator.clipboard.readText()"))
    assert appliance.url in text
    program = tmp_path / "snippet"
    program.write_text(text)
    done = subprocess.run(["bash" if name == "curl" else sys.executable, str(program)], capture_output=True, text=True,
                          timeout=60, env={"PATH": os.environ["PATH"], "SHOEHORN_API_KEY": appliance.key})
    assert done.returncode == 0, done.stderr
    assert "hoehorn" in done.stdout


def test_page_follows_a_pull_and_a_restart_of_the_engine(start: Callable[..., Appliance],
                                                                visit: Visits) -> None:
    size = (DEMO_MODEL / "model.safetensors").stat().st_size
    with Hub({"owner/demo": DEMO_MODEL}, bytes_per_second=size // 5) as hub:
        own = start(MODEL_SOURCE="modelscope", MODEL_ID="owner/demo", MODELSCOPE_ENDPOINT=hub.url)
        wait_until(lambda: listens(own), 30, "the gateway listens")
        seen = visit(own.url, refusals=(503,))
        seen.wait_for("#headline", "Downloading the model", 30)
        seen.wait_for("#rate", "/s", 30)
        seen.wait_for("#left", "left", 30)
        assert 0 <= seen.page.locator("#progress").evaluate("bar => bar.value") <= 1
        expect(seen.page.locator("#plan-facts")).to_contain_text("2,048 tokens")
        seen.wait_for("#headline", "Loading the model", 60)
    seen.wait_for("#badge", "Ready", 120)
    seen.use_key(own.key)
    ask_for_long(seen)
    own.find("VLLM::EngineCor").send_signal(signal.SIGKILL)
    expect(seen.page.locator(".assistant .error")).not_to_be_empty(timeout=30_000)
    seen.wait_for("#notice", "restarts automatically", 30)
    expect(seen.page.get_by_role("button", name="Send")).to_be_disabled()
    seen.wait_for("#notice", "ready again", 120)
    assert StateFile(own.run_dir).read().restarts == 1
    seen.page.get_by_role("button", name="New conversation").click()
    seen.ask(NAME)
    expect(seen.page.locator("#activity")).to_have_text("Response complete.", timeout=60_000)
    assert "Shoehorn" in seen.text(".assistant .text")
