"""Engine core of the stand-in: a process with a worker of its own that produces one token every few milliseconds."""

import asyncio
import subprocess
import sys

TOKEN_SECONDS = 0.02
_WORKER = "import time; time.sleep(3600)"
_CORE = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-I", "-S", "-c", {_WORKER!r}, "VLLM::Worker"], stdout=subprocess.DEVNULL)
while worker.poll() is None:
    try:
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        pass  # it outlives its API server, which must therefore be cleaned up by others
    time.sleep({TOKEN_SECONDS})
"""


class EngineDeadError(Exception):
    """The engine core has exited."""


class Core:
    """The running engine core: started like vLLM's before the API server serves, then read from the event loop."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _CORE, "VLLM::EngineCore"],
                                         stdout=subprocess.PIPE)
        self._step = asyncio.Condition()
        self.tokens = 0

    @property
    def dead(self) -> bool:
        """True once the process has exited."""
        return self._process.poll() is not None

    async def run(self) -> None:
        """Count tokens until the process exits."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader),
                                                           self._process.stdout)
        while await reader.read(1):
            await self._announce()
        self._process.wait()
        await self._announce()

    async def step(self) -> None:
        """Wait for the next token.

        Raises:
            EngineDeadError: the process exited first.
        """
        async with self._step:
            if not self.dead:
                await self._step.wait()
        if self.dead:
            raise EngineDeadError

    async def _announce(self) -> None:
        async with self._step:
            self._step.notify_all()
