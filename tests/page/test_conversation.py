"""The conversation on the console page: what stays in view, what a reload keeps, options, and edited questions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from shoehorn.runtime.state import Phase
from support.browser import Visits
from support.gateway_process import Gateway
from support.page_states import chatting, plan_of_the_70b, say

pytestmark = pytest.mark.browser

PHONE, LAPTOP = 390, 1366
LINES = "\n".join(f"line {number}" for number in range(80))


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path) as running:
        yield running


def hidden_pixels(log: Locator) -> int:
    """Return how far the end of the log is below its view."""
    return int(log.evaluate("log => log.scrollHeight - log.scrollTop - log.clientHeight"))


@pytest.mark.parametrize("width", [PHONE, LAPTOP])
def test_view_follows_the_answer_whatever_is_drawn_until_the_reader_scrolls_up(gate: Gateway, visit: Visits,
                                                                              width: int) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit, width=width)
        log = seen.page.locator("#log")
        engine.script = [*say("Here:\n\n", f"```\n{LINES}\n```\n\n", "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 40,
                              "\nThe end.", "\n\nAfter " * 60, "\n\nLast."), "[DONE]"]
        seen.ask("Hello")
        for pieces, words in ((2, "line 79"), (1, "1"), (1, "The end.")):
            engine.allow(pieces)
            expect(seen.page.locator(".assistant .text")).to_contain_text(words)
            expect(seen.page.locator("#send")).to_be_in_viewport()
            seen.page.wait_for_function("log.scrollHeight - log.scrollTop - log.clientHeight < 4")
        log.evaluate("log => { log.scrollTop = 10; }")
        seen.page.wait_for_function("log.scrollTop === 10")
        engine.allow(5)
        seen.wait_for("#activity", "complete")
        assert hidden_pixels(log) > 1000, "the reader scrolled up"
        expect(seen.page.locator("#send")).to_be_in_viewport()


def test_reload_keeps_the_conversation_of_the_tab(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.allow(500)
        engine.script = [*say("Thinking.", field="reasoning"), *say("**One**."), "[DONE]"]
        seen.ask("First <b>")
        seen.wait_for("#activity", "complete")
        seen.page.reload()
        expect(seen.page.locator(".assistant strong")).to_have_text("One")
        expect(seen.page.locator(".user .text")).to_have_text("First <b>")
        assert seen.page.locator(".assistant .reasoning div").text_content() == "Thinking."
        engine.script = [*say("Two."), "[DONE]"]
        seen.ask("Second")
        expect(seen.page.locator(".assistant .text").last).to_have_text("Two.")
        sent = json.loads(engine.requests[-1].body)["messages"]
        assert [message["content"] for message in sent] == ["First <b>", "**One**.", "Second"]
        seen.page.get_by_role("button", name="New conversation").click()
        seen.page.reload()
        expect(seen.page.locator("#composer")).to_be_visible()
        expect(seen.page.locator("#log")).to_be_hidden()


def test_edited_question_replaces_what_follows(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.allow(500)
        for question, answer in (("One?", "1"), ("Two?", "2"), ("Three?", "3")):
            engine.script = [*say(answer), "[DONE]"]
            seen.ask(question)
            expect(seen.page.locator(".assistant .text").last).to_have_text(answer)
            expect(seen.page.locator("#stop")).to_be_hidden()
        edit = seen.page.locator(".user").nth(1).get_by_role("button", name="Edit")
        edit.click()
        expect(seen.page.locator("#editing")).to_be_visible()
        expect(seen.page.locator("#message")).to_have_value("Two?")
        seen.page.get_by_role("button", name="Cancel").click()
        expect(seen.page.locator("#message")).to_have_value("")
        expect(seen.page.locator(".user")).to_have_count(3)
        edit.click()
        engine.script = [*say("22"), "[DONE]"]
        seen.ask("Two, again?")
        expect(seen.page.locator(".assistant .text").last).to_have_text("22")
        assert seen.page.locator(".user .text").all_inner_texts() == ["One?", "Two, again?"]
        sent = json.loads(engine.requests[-1].body)["messages"]
        assert [message["content"] for message in sent] == ["One?", "1", "Two, again?"]


def test_options_are_behind_a_fold_and_part_of_the_request(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.allow(500)
        engine.script = [*say("Yes."), "[DONE]"]
        expect(seen.page.get_by_label("System prompt")).to_be_hidden()
        seen.page.get_by_text("Options").click()
        seen.page.get_by_label("System prompt").fill("Be brief.")
        seen.page.get_by_label("Temperature").fill("0.5")
        seen.page.get_by_label("Longest answer").fill("64")
        seen.ask("Hello")
        seen.wait_for("#activity", "complete")
        sent = json.loads(engine.requests[-1].body)
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (sent["temperature"], sent["max_tokens"]) == (0.5, 64)
        seen.page.reload()
        expect(seen.page.get_by_label("Temperature")).to_have_value("0.5")
        for label in ("System prompt", "Temperature", "Longest answer"):
            seen.page.get_by_label(label).fill("")
        seen.ask("Again")
        expect(seen.page.locator(".user")).to_have_count(2)
        expect(seen.page.locator("#stop")).to_be_hidden()
        sent = json.loads(engine.requests[-1].body)
        assert {"temperature", "max_tokens"}.isdisjoint(sent)
        assert sent["messages"][0]["role"] == "user"


def test_copy_needs_no_hover(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.allow(500)
        engine.script = [*say("```\ncode\n```"), "[DONE]"]
        seen.ask("Hello")
        seen.wait_for("#activity", "complete")
        seen.page.mouse.move(0, 0)
        seen.page.locator("#message").focus()
        for button in seen.page.locator(".message button").all():
            assert button.evaluate("button => getComputedStyle(button).opacity") == "1"


def test_model_that_was_never_downloaded_has_no_download_step(gate: Gateway, visit: Visits) -> None:
    gate.states.update(phase=Phase.LOADING)
    seen = visit(gate.url)
    seen.wait_for("#headline", "Loading the model")
    expect(seen.page.locator('[data-step="fetch"]')).to_be_hidden()
    gate.states.update(bytes_done=5, bytes_total=5)
    expect(seen.page.locator('[data-step="fetch"]')).to_have_attribute("data-state", "done")
    expect(seen.page.locator('[data-step="fetch"]')).to_be_visible()


@pytest.mark.parametrize(("language", "words"), [("en-US", "Your next message starts it"), ("zh-CN", "发送下一条消息")])
def test_idle_engine_is_explained_and_takes_a_message(gate: Gateway, visit: Visits, language: str, words: str) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit, language=language, refusals=(503,))
        gate.states.update(phase=Phase.IDLE)
        seen.wait_for("#notice", words)
        expect(seen.page.locator("#send")).to_be_enabled()
        expect(seen.page.locator("#start")).to_be_hidden()
        seen.page.locator("#message").fill("Hello")
        seen.page.keyboard.press("Enter")
        expect(seen.page.locator(".assistant .error")).to_contain_text("stopped because it was idle")
        assert (gate.run_dir / "wake").exists()
        assert seen.page.locator("#message").input_value() == "Hello", "to be sent again"


def test_conversation_is_accessible_and_fits(gate: Gateway, visit: Visits) -> None:
    gate.states.update(plan=plan_of_the_70b().public_summary())
    complaints: list[str] = []
    with gate.engine() as engine:
        for language, scheme, width in itertools.product(("en-US", "zh-CN"), ("light", "dark"), (PHONE, LAPTOP)):
            seen = chatting(gate, engine, visit, language=language, scheme=scheme, width=width)
            engine.allow(500)
            engine.script = [*say("Some thoughts.", field="reasoning"), *say("Text.\n```py\nx = 1\n```"), "[DONE]"]
            seen.page.locator("#options summary").click()
            seen.page.locator("#message").fill("你叫啥?")
            seen.page.keyboard.press("Enter")
            expect(seen.page.locator(".assistant pre")).to_be_visible()
            expect(seen.page.locator("#stop")).to_be_hidden()
            seen.page.locator(".user button").first.click()
            expect(seen.page.locator("#editing")).to_be_visible()
            complaints += [f"{language} {scheme} {width}: {each}" for each in seen.complaints()]
            complaints += [f"{language} {scheme} {width}: scrolls sideways"] if seen.scrolls_sideways() else []
    assert not complaints, "\n".join(complaints)
