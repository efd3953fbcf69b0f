"""The console page in a real browser through a real nginx; state and engine are stand-ins, for rare states."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from playwright.sync_api import expect

from fakes.engine import Answer
from shoehorn.common.units import GIB
from shoehorn.engine import memory_report
from shoehorn.runtime.state import Phase
from support.browser import NARROW, Visits
from support.gateway_process import KEY, MODEL, Gateway
from support.page_states import SERVED, chatting, loaded, plan_of_the_70b, pull, say, usage

pytestmark = pytest.mark.browser

LANGUAGES, SCHEMES = ("en-US", "zh-CN"), ("light", "dark")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path) as running:
        yield running


def test_start_shows_phase_progress_rate_remaining_time_and_plan(gate: Gateway, visit: Visits) -> None:
    seen = visit(gate.url)
    seen.wait_for("#headline", "Detecting hardware")
    expect(seen.page.locator("#plan")).to_be_hidden()
    pull(gate, 35 * GIB)
    seen.wait_for("#headline", "Downloading the model")
    assert seen.text("#start .facts").replace("\n", " ").startswith(
        f"{MODEL} 35.00 GiB / 140.00 GiB 25 % 100 MiB/s 17 min left")
    bar = seen.page.get_by_role("progressbar", name="Downloading the model")
    assert bar.evaluate("bar => bar.value") == 0.25
    assert seen.page.get_by_role("listitem").nth(1).get_attribute("aria-current") == "step"
    facts = seen.text("#plan-facts")
    assert "70" not in facts.split("Model files")[0]
    assert seen.page.locator("#legend li").all_inner_texts() == [
        "Weights", "Embeddings and output head", "Offload buffers", "KV cache", "CUDA graphs", "Framework",
        "Activations"]
    for words in ("quantized to NF4", "8,192 tokens", "offloaded weights", "tokens/s for one request"):
        assert words in facts, facts
    gate.states.update(phase=Phase.LOADING, progress=None, detail="loading the weights")
    seen.wait_for("#detail", "loading the weights")
    assert seen.text("#rate") + seen.text("#left") + seen.text("#amount") == ""
    assert seen.page.locator("#progress").get_attribute("value") is None


def test_replicas_of_a_front_are_listed_with_their_states(gate: Gateway, visit: Visits) -> None:
    seen = visit(gate.url)
    expect(seen.page.locator("#machines")).to_be_hidden()
    gate.states.update(phase=Phase.WAITING, progress=None, detail="0 of 3 replicas are ready", replicas=(
        {"name": "gpu1", "state": "lost", "reason": "L4CON Connection refused"},
        {"name": "gpu2", "state": "draining", "reason": "L7OKC 404 Not Found"},
        {"name": "<b>gpu3</b>", "state": "ready", "reason": ""}))
    seen.wait_for("#headline", "Waiting for other machines")
    items = seen.page.locator("#machine-list li")
    assert items.all_inner_texts() == ["gpu1: lost", "gpu2: no new requests", "<b>gpu3</b>: ready"]
    assert items.first.get_attribute("title") == "L4CON Connection refused"


def test_chart_of_each_gpu_is_to_scale_with_expected_and_measured(gate: Gateway, visit: Visits) -> None:
    plan = plan_of_the_70b()
    pull(gate, 1)
    seen = visit(gate.url)
    seen.wait_for("h3", "VRAM of GPU 1")
    assert seen.page.locator(".stack").count() == 2
    gate.states.update(memory=loaded(plan))
    seen.wait_for(".vram-label", "Measured")
    assert seen.page.locator(".stack").count() == 4
    card, parts = seen.page.locator(".gpu").first, plan.vram[0]
    whole = max(parts.limit_bytes, 17 * GIB)
    inside = "stack => [...stack.children].map(piece => [piece.dataset.part, piece.getBoundingClientRect().width / " \
             "stack.clientWidth])"
    expected = dict(card.locator(".stack").first.evaluate(inside))
    for part, share in expected.items():
        size = parts.to_json().get(f"{part}_bytes", parts.limit_bytes - parts.total_bytes)
        assert share == pytest.approx(size / whole, abs=0.005), part
    assert {"weights", "offload_buffer", "kv_cache", "activations", "framework"} <= set(expected)
    measured = dict(card.locator(".stack").last.evaluate(inside))
    assert sum(measured.values()) == pytest.approx(17 * GIB / whole, abs=0.005)
    picture = card.get_by_role("img").last.get_attribute("aria-label") or ""
    assert picture.startswith("Measured: Weights ")
    card.get_by_label("Details of GPU 0").click()
    rows = card.locator("tr").all_inner_texts()
    assert any(row.startswith("Total") and row.endswith("17.00 GiB") for row in rows), rows


def test_measured_quantization_state_is_a_separate_part(gate: Gateway, visit: Visits) -> None:
    cards = [replace(parts, quant_state_bytes=2 * GIB) for parts in plan_of_the_70b().vram]
    rows = memory_report.compare(cards, {0: {"weights_bytes": 12 * GIB, "quant_state_bytes": GIB,
                                             "kv_cache_bytes": GIB}}, [17 * GIB])
    pull(gate, 1)
    gate.states.update(plan={**gate.states.read().plan, "vram": [parts.to_json() for parts in cards]},
                       memory=tuple(asdict(row) for row in rows))
    seen = visit(gate.url)
    card = seen.page.locator(".gpu").first
    card.get_by_label("Details of GPU 0").click()
    found = {row.split("\t")[0].strip(): row.split("\t")[1:] for row in card.locator("tr").all_inner_texts()}
    assert found["Quantization state"] == ["2.00 GiB", "1.00 GiB"]
    assert found["Weights"][1] == "11.00 GiB"
    drawn = card.locator(".stack").last.locator("span").evaluate_all("found => found.map(each => each.dataset.part)")
    assert drawn == ["weights", "quant_state", "kv_cache", "framework"]


def test_plan_for_the_cpu_is_labelled(gate: Gateway, visit: Visits) -> None:
    pull(gate, 1)
    gate.states.update(plan={**gate.states.read().plan, "vram": []})
    seen = visit(gate.url)
    seen.wait_for("#vram", "no VRAM")


def test_failure_shows_cause_and_remedy(gate: Gateway, visit: Visits) -> None:
    gate.states.update(phase=Phase.FAILED, cause="The disk is <b>full</b>.", remedy="Free 3 GiB.")
    seen = visit(gate.url)
    alert = seen.page.get_by_role("alert").filter(has_text="is unavailable")
    expect(alert).to_contain_text("The disk is <b>full</b>.")
    expect(alert).to_contain_text("Free 3 GiB.")
    expect(seen.page.locator("#start")).to_be_hidden()


def test_lost_connection_is_shown_and_recovers(gate: Gateway, visit: Visits) -> None:
    seen = visit(gate.url)
    seen.wait_for("#headline", "Detecting hardware")
    seen.page.route("**/status", lambda route: route.fulfill(status=200, body="half a doc"))
    seen.wait_for("#notice", "Connection lost")
    seen.page.unroute("**/status")
    expect(seen.page.locator("#notice")).to_be_empty()


def test_reasoning_and_code_have_their_own_elements(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.script = [*say("I think ", "<b>so</b>.", field="reasoning"), *say("Older.", field="reasoning_content"),
                         *say("Look:\n```js\n<script>alert(1)</script>\n```\n", "<img src=x onerror=alert(1)>"),
                         usage(12, 30), "[DONE]"]
        seen.ask("Hello")
        engine.allow(2)
        seen.wait_for(".assistant .reasoning", "I think <b>so</b>.")
        engine.allow(4)
        seen.wait_for("#activity", "complete")
        reasoning, answer = seen.page.locator(".assistant .reasoning"), seen.page.locator(".assistant .text")
        assert reasoning.get_attribute("open") is None, "closed when the answer begins"
        assert reasoning.locator("div").text_content() == "I think <b>so</b>.Older."
        assert answer.locator("pre").inner_text() == "<script>alert(1)</script>"
        assert answer.locator("script, img").count() == 0
        assert answer.locator("p").last.inner_text() == "<img src=x onerror=alert(1)>"
        assert seen.text("#context") == "Context: 42 of 4,096 tokens"
        engine.script = ["[DONE]"]
        seen.ask("And?")
        expect(seen.page.locator(".user")).to_have_count(2)
        expect(seen.page.locator("#stop")).to_be_hidden()
        sent = json.loads(engine.requests[-1].body)["messages"]
        assert [message["role"] for message in sent] == ["user", "assistant", "user"]
        assert "I think" not in sent[1]["content"]
        seen.page.get_by_role("button", name="New conversation").click()
        expect(seen.page.locator("#log")).to_be_hidden()


MARKDOWN = r"""# Ways
1. **Quantize**: `NF4`
2. 卸载：**放不下的部分。**用到时再取
   - nested

| part | size |
|---|---|
| weights | **12** |

> quoted

Speed is \(v = b_1 * w_2 * x\), see [the page](https://example.com/a). <b>raw</b>

```python
if a < b: pass
```"""


def test_markdown_is_rendered_as_elements_only(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        seen.context.grant_permissions(["clipboard-read", "clipboard-write"])
        engine.script = [*say(*(MARKDOWN[place:place + 3] for place in range(0, len(MARKDOWN), 3))), "[DONE]"]
        engine.allow(500)
        seen.ask("# Not a heading, as I typed it")
        seen.wait_for("#activity", "complete")
        answer = seen.page.locator(".assistant .text")
        assert answer.locator("h4").all_inner_texts() == ["Ways"]
        assert answer.locator("strong").all_inner_texts() == ["Quantize", "放不下的部分。", "12"]
        assert answer.locator("ol > li").count() == 2
        assert answer.locator("ol ul li").all_inner_texts() == ["nested"]
        assert answer.locator("td").all_inner_texts() == ["weights", "12"]
        assert answer.locator("blockquote").inner_text() == "quoted"
        text = answer.locator("p", has_text="Speed").inner_text()
        assert text == r"Speed is \(v = b_1 * w_2 * x\), see the page (https://example.com/a). <b>raw</b>"
        assert answer.locator("a, b, em").count() == 0
        answer.locator(".code button").click()
        assert seen.page.evaluate("navigator.clipboard.readText()") == "if a < b: pass"
        seen.page.locator(".assistant > .bar button").click()
        assert seen.page.evaluate("navigator.clipboard.readText()") == MARKDOWN
        assert seen.text(".user .text") == "# Not a heading, as I typed it"


def test_answer_is_regenerated_and_an_idea_starts_a_conversation(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.allow(500)
        engine.script = [*say("One."), "[DONE]"]
        seen.page.locator("#ideas button").first.click()
        expect(seen.page.locator(".assistant .text")).to_have_text("One.")
        expect(seen.page.locator("#ideas")).to_be_hidden()
        engine.script = [*say("Two."), usage(3, 2), "[DONE]"]
        seen.page.get_by_role("button", name="Regenerate").click()
        expect(seen.page.locator(".assistant .text")).to_have_text("Two.")
        expect(seen.page.locator(".user")).to_have_count(1)
        assert "first token after" in seen.text("#first")
        sent = json.loads(engine.requests[-1].body)["messages"]
        assert sent == [{"role": "user", "content": "What is your name?"}]


def test_chosen_model_is_kept_for_the_tab(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        expect(seen.page.locator("#models")).to_be_hidden()
        engine.answers["/v1/models"] = Answer(200, {"object": "list", "data": [
            {"id": MODEL, "object": "model", "max_model_len": 4096},
            {"id": "adapter", "object": "model", "max_model_len": 2048}]})
        seen.page.reload()
        seen.page.get_by_label("Model").select_option("adapter")
        seen.page.reload()
        expect(seen.page.get_by_label("Model")).to_have_value("adapter")
        engine.script = [*say("Yes."), usage(3, 2), "[DONE]"]
        engine.allow(500)
        seen.ask("Hello")
        expect(seen.page.locator("#context")).to_have_text("Context: 5 of 2,048 tokens")
        assert json.loads(engine.requests[-1].body)["model"] == "adapter"


@pytest.mark.parametrize(("answer", "words"), [
    (Answer(429, {"error": {"message": "Two at a time."}}, {"Retry-After": "7"}), "Two at a time. Retry in 7 s."),
    (Answer(429, {"error": {"message": "Slowly."}}), "Slowly. Retry in 1 s."),
    (Answer(400, {"error": {"message": "The context is 4096 tokens."}}), "The context is 4096 tokens."),
    (Answer(500, {"odd": 1}), "Status 500")])
def test_refusal_shows_the_servers_message(gate: Gateway, visit: Visits, answer: Answer, words: str) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit, refusals=(answer.status,))
        engine.answers["/v1/chat/completions"] = answer
        seen.ask("Hello")
        expect(seen.page.locator(".assistant .error")).to_have_text(words)
        assert seen.page.get_by_label("Your message").input_value() == "Hello", "to be sent again"


def test_failed_stream_shows_its_error_and_keeps_the_text(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        engine.allow(9)
        died = json.dumps({"error": {"message": "The engine died.", "code": 500}})
        engine.script = [*say("Half of "), died, "[DONE]"]
        seen.ask("Hello")
        expect(seen.page.locator(".assistant .error")).to_have_text("The engine died.")
        assert seen.text(".assistant .text") == "Half of "
        engine.script = say("Half of ")
        seen.ask("Again")
        expect(seen.page.locator(".assistant .error").last).to_have_text(
            "The connection was lost before the response was complete.")


def test_page_shows_not_ready_and_recovers(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit, refusals=(503,))
        gate.states.update(phase=Phase.LOADING, detail="starting the engine again")
        seen.ask("Still there?")  # before the page knows
        expect(seen.page.locator(".assistant .error")).to_contain_text(
            "The model is not ready: loading. Retry in 5 s.")
        seen.wait_for("#notice", "restarts automatically")
        expect(seen.page.get_by_role("button", name="Send")).to_be_disabled()
        expect(seen.page.locator("#start")).to_be_visible()
        gate.states.update(phase=Phase.READY)
        seen.wait_for("#notice", "ready again")
        engine.allow(9)
        engine.script = [*say("Yes."), "[DONE]"]
        seen.page.get_by_role("button", name="Send").click()
        expect(seen.page.locator(".assistant .text").last).to_have_text("Yes.")


def test_key_stays_in_the_tab_and_out_of_addresses(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        seen = chatting(gate, engine, visit)
        seen.page.reload()
        expect(seen.page.locator("#composer")).to_be_visible()
        assert not [address for address in seen.addresses if KEY in address or "key" in address]
        assert seen.page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
        assert KEY not in seen.page.content()
        other = seen.context.new_page()
        other.goto(gate.url)
        expect(other.locator("#key-form")).to_be_visible()
        other.close()
        seen.page.get_by_role("button", name="Forget the key").click()
        expect(seen.page.locator("#key")).to_be_focused()
        assert seen.page.evaluate("JSON.stringify(sessionStorage)") == "{}"


def test_language_follows_the_browser_until_it_is_chosen(gate: Gateway, visit: Visits) -> None:
    gate.states.update(phase=Phase.LOADING, detail="loading the weights", plan=plan_of_the_70b().public_summary())
    seen = visit(gate.url, language="zh-CN")
    seen.wait_for("#headline", "正在加载模型")
    assert (seen.page.locator("html").get_attribute("lang"), seen.text("#detail")) == ("zh-CN", "正在加载权重")
    seen.page.get_by_role("button", name="English").click()
    seen.wait_for("#headline", "Loading the model")
    seen.wait_for("#plan-title", "The plan")
    seen.page.reload()
    seen.wait_for("#headline", "Loading the model")
    assert seen.page.locator("html").get_attribute("lang") == "en"
    missing = seen.page.evaluate("""import("./words.js").then(({TEXT}) => Object.keys(TEXT.en).filter(
        (key) => !(key in TEXT.zh)).concat(Object.keys(TEXT.zh).filter(
            (key) => !(key in TEXT.en) && !key.startsWith("detail."))))""")
    assert missing == []


def test_keyboard_reaches_everything_in_document_order(gate: Gateway, visit: Visits) -> None:
    with gate.engine() as engine:
        gate.states.update(plan=plan_of_the_70b().public_summary())
        seen = chatting(gate, engine, visit)
        engine.script = [*say("Yes."), "[DONE]"]
        engine.allow(9)
        seen.ask("Hello")
        seen.wait_for("#activity", "complete")
        reached = ["language"]
        seen.page.locator("#language").focus()
        while "/readyz" not in reached and len(reached) < 30:
            seen.page.keyboard.press("Tab")
            reached.append(seen.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        expected = ["language", "again", "clear", "log", "message", "send", "forget", "curl", "Python, openai",
                    "/status", "/readyz"]
        assert [name for name in reached if name in expected] == expected, reached
        seen.page.get_by_label("Your message").focus()
        seen.page.keyboard.type("one")
        seen.page.keyboard.press("Shift+Enter")
        seen.page.keyboard.type("two")
        assert seen.page.get_by_label("Your message").input_value() == "one\ntwo"


def test_every_state_is_accessible_and_fits(gate: Gateway, visit: Visits) -> None:
    found: list[str] = []
    pull(gate, 35 * GIB)
    gate.states.update(memory=loaded(plan_of_the_70b()))
    looks = [visit(gate.url, language=language, scheme=scheme, width=NARROW)
             for language, scheme in itertools.product(LANGUAGES, SCHEMES)]

    def judge(face: str) -> None:
        for seen, (language, scheme) in zip(looks, itertools.product(LANGUAGES, SCHEMES), strict=True):
            where = f"{face}, {language}, {scheme}"
            found.extend(f"{where}: {complaint}" for complaint in seen.complaints())
            if seen.scrolls_sideways():
                found.append(f"{where}: scrolls sideways")

    for seen in looks:
        expect(seen.page.locator(".stack")).to_have_count(4)
    judge("pulling")
    gate.states.update(phase=Phase.FAILED, progress=None, cause="c" * 200, remedy="Type this.")
    for seen in looks:
        expect(seen.page.locator("#failure")).to_be_visible()
    judge("failed")
    with gate.engine() as engine:
        for seen in looks:
            expect(seen.page.locator("#key-form")).to_be_visible()
        judge("ready, no key")
        engine.answers["/v1/models"] = SERVED
        engine.script = [*say("Some ", "thoughts.", field="reasoning"),
                         *say("```\nx = " + "long " * 60 + "\n```\n", "w" * 300), usage(99, 300), "[DONE]"]
        engine.allow(500)
        for seen in looks:
            seen.page.locator("#key").fill(KEY)
            seen.page.locator("#key-form button").click()
            expect(seen.page.locator("#message")).to_be_focused()
            seen.page.locator("#message").fill("Hello")
            seen.page.locator("#send").click()
            expect(seen.page.locator("#context-meter")).to_be_visible()
            expect(seen.page.locator("#stop")).to_be_hidden()
        judge("chat")
    assert not found, "\n".join(found)
