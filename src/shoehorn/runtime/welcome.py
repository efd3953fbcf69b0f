"""Text that is printed when the server is ready: what it serves, and an example call.

Rules: `shoehorn serve` knows address and key, and the engine program the task of the model; the facts are kept in a
file of the run directory until the text is printed, because they may contain a key.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass

_SERVES = {"generate": "text", "embed": "embeddings; no text", "classify": "ranking and scores; no text",
           "reward": "scores; no text"}
_EXAMPLES: dict[str, tuple[str, dict[str, object]]] = {
    "generate": ("/v1/chat/completions", {"stream": True, "messages": [{"role": "user", "content": "你叫啥?"}]}),
    "embed": ("/v1/embeddings", {"input": "A shoehorn helps a foot into a shoe."}),
    "classify": ("/v1/rerank", {"query": "What is a shoehorn?", "documents": [
        "A shoehorn helps a foot into a shoe.", "Snow falls in winter."]}),
    "reward": ("/v1/embeddings", {"input": "A shoehorn helps a foot into a shoe."}),
}


@dataclass(frozen=True)
class Welcome:
    """Facts of the text.

    Attributes:
        model: name that clients send.
        url: address of the gateway, without a path.
        command: curl with its options.
        bearer: key, or a placeholder.
        notice: last line; "" for none.
    """

    model: str
    url: str
    command: str
    bearer: str
    notice: str = ""

    def to_json(self) -> str:
        """Format the file of the run directory."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Welcome:
        """Parse the file of the run directory."""
        return cls(**json.loads(text))

    def text(self, task: str = "generate") -> str:
        """Return the text for a model's task."""
        path, fields = _EXAMPLES[task]
        body = shlex.quote(json.dumps({"model": self.model, **fields}, ensure_ascii=False))
        serves = "" if task == "generate" else f" ({_SERVES[task]})"
        return "\n".join([
            "", f"Ready: {self.model} on {self.url}{serves}. Try:", "",
            f'{self.command} {self.url}{path} -H "Authorization: Bearer {self.bearer}" '
            f'-H "Content-Type: application/json" -d {body}', "", *([self.notice, ""] if self.notice else [])])
