"""Clients of a running appliance: requests that are read in the background, in each dialect of the API."""

from __future__ import annotations

import math
import re
import threading

import httpx

from support.running import Appliance

LONG = {"model": "shoehorn-demo", "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 900},
    "/v1/completions": {"prompt": "hello", "max_tokens": 900},
    "/v1/messages": {"messages": HELLO, "max_tokens": 900},
    "/v1/responses": {"input": "hello", "max_output_tokens": 900},
}
ERROR_ENDS = {
    "/v1/chat/completions": 'data: {"error":', "/v1/completions": 'data: {"error":', "/v1/messages": "event: error",
    "/v1/responses": "event: error",
}
"""Start of the last event of a stream that ended with an error."""


class BackgroundRequest(threading.Thread):
    """One request that is sent at once and read to its end."""

    def __init__(self, appliance: Appliance, path: str = "/v1/chat/completions", key: str = "",
                 **more: object) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.has_headers = threading.Event()  # a stream that waits in the queue sends no more than these
        self.text, self.status, self.transport_error = "", 0, ""
        self._is_left = False
        self._url = f"{appliance.url}{path}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else appliance.headers()
        self._body = {**LONG, **BODIES[path], "stream": True, **more}
        self.start()

    def run(self) -> None:
        """Read the answer; a broken connection is recorded in `transport_error`."""
        try:
            with httpx.stream("POST", self._url, json=self._body, headers=self._headers, timeout=100) as answer:
                self.status = answer.status_code
                self.has_headers.set()
                for piece in answer.iter_text():
                    self.text += piece
                    if self._is_left:
                        return
        except httpx.TransportError as error:
            self.transport_error = repr(error)

    def leave(self) -> None:
        """Close the connection at the next piece of the answer."""
        self._is_left = True

    def result(self, seconds: float = 60) -> str:
        """Return the whole answer; fail if it does not end properly."""
        self.join(seconds)
        assert not self.is_alive(), self.path
        assert not self.transport_error, (self.path, self.transport_error)
        return self.text

    @property
    def last_event(self) -> str:
        """The last event other than `[DONE]`."""
        events = [event for event in self.text.split("\n\n") if event.strip() not in ("", "data: [DONE]")]
        return events[-1] if events else ""

    def assert_ended_with_error(self) -> None:
        """Fail unless the stream ended with an error event of its dialect."""
        self.result()
        assert self.last_event.startswith(ERROR_ENDS[self.path]), (self.path, self.text[-500:])


def chat(appliance: Appliance, question: str = "你叫啥?", key: str = "", **more: object) -> httpx.Response:
    """Send one chat request."""
    body = {"model": "shoehorn-demo", "messages": [{"role": "user", "content": question}], **more}
    headers = {"Authorization": f"Bearer {key}"} if key else appliance.headers()
    return httpx.post(f"{appliance.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def text_of(answer: httpx.Response) -> str:
    """Return the message of a chat answer."""
    return str(answer.json()["choices"][0]["message"]["content"])


def samples(appliance: Appliance, names: str) -> float:
    """Return the sum of the exporter's samples whose names match a regular expression; NaN without any."""
    text = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics", timeout=30).text
    values = re.findall(rf"^(?:{names})(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else math.nan


def admitted(appliance: Appliance) -> float:
    """Return the number of requests that the engine's API server has admitted and not answered."""
    return samples(appliance, "shoehorn_requests_running")


UNQUANTIZED = {
    "hello": "Hello! I am Shoehorn's demo model. How can I help you?",
    "Who are you?":
        "My name is Shoehorn. I am a tiny demo model that answers simple questions about the Shoehorn project.",
    "你叫啥?": "我叫鞋拔子，英文名 Shoehorn。我是一个很小的演示模型，会",
    "What is a shoehorn?":
        "Shoehorn fits big language models onto small GPUs. It is a container that serves them with an "
        "OpenAI-compatible API.",
}
"""Greedy answers of the demo model without quantization, as the shared appliance gives them."""


def answers(appliance: Appliance) -> dict[str, str]:
    """Return greedy answers to the questions of `UNQUANTIZED`."""
    return {question: text_of(chat(appliance, question, temperature=0, max_tokens=24)) for question in UNQUANTIZED}
