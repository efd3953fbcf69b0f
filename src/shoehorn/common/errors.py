"""The errors that a person sees: each says what is wrong and what to type, and carries the documented exit code."""

from __future__ import annotations

import signal

EXIT_DONE = 0
EXIT_BAD_SETTINGS = 2
EXIT_DOES_NOT_FIT = 3
EXIT_MODEL_UNAVAILABLE = 4
EXIT_ENGINE_FAILED = 5
EXIT_NOT_READ = 128 + signal.SIGPIPE
"""What a shell says of a program that ended because nobody read on."""


class ShoehornError(Exception):
    """A failure that a person can act on.

    Args:
        cause: what is wrong, one sentence or short paragraph.
        remedy: what to type or change.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n  -> {self.remedy}" if self.remedy else self.cause


class SettingsError(ShoehornError):
    """A setting, profile or combination of them that cannot be used."""

    exit_code = EXIT_BAD_SETTINGS


class DoesNotFitError(ShoehornError):
    """The model does not fit this machine with these settings."""

    exit_code = EXIT_DOES_NOT_FIT


class ModelUnavailableError(ShoehornError):
    """The model cannot be had: hub, network, disk, or a file that fails its check."""

    exit_code = EXIT_MODEL_UNAVAILABLE


class EngineFailedError(ShoehornError):
    """The engine did not start, or died more often than restarts are allowed."""

    exit_code = EXIT_ENGINE_FAILED
