"""Clients of a running appliance: streams that are read in the background, in each dialect that it speaks."""

from __future__ import annotations

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
"""What stands in the last events of a stream that ended with an error."""


class Asking(threading.Thread):
    """One request, sent at once and read to its end."""

    def __init__(self, appliance: Appliance, path: str = "/v1/chat/completions", key: str = "",
                 **more: object) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.began = threading.Event()  # the headers are there; a stream that waits in the queue has no more
        self.text, self.status, self.broken = "", 0, ""
        self._url = f"{appliance.url}{path}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else appliance.headers()
        self._body = {**LONG, **BODIES[path], "stream": True, **more}
        self.start()

    def run(self) -> None:
        """Read; a connection that breaks off is noted in `broken`."""
        try:
            with httpx.stream("POST", self._url, json=self._body, headers=self._headers, timeout=100) as answer:
                self.status = answer.status_code
                self.began.set()
                for piece in answer.iter_text():
                    self.text += piece
        except httpx.TransportError as error:
            self.broken = repr(error)

    def finish(self, seconds: float = 60) -> str:
        """All of the answer; fails when it does not end properly."""
        self.join(seconds)
        assert not self.is_alive(), self.path
        assert not self.broken, (self.path, self.broken)
        return self.text

    @property
    def last(self) -> str:
        """The last event that is more than `[DONE]`."""
        events = [event for event in self.text.split("\n\n") if event.strip() not in ("", "data: [DONE]")]
        return events[-1] if events else ""


QUESTIONS = ("hello", "Who are you?", "你叫啥?", "What is a shoehorn?")


def answers(appliance: Appliance) -> list[str]:
    """Greedy answers to a few questions."""
    with httpx.Client(headers=appliance.headers(), timeout=60) as client:
        return [client.post(f"{appliance.url}/v1/chat/completions", json={
            "model": "shoehorn-demo", "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": 24}).json()["choices"][0]["message"]["content"] for question in QUESTIONS]
