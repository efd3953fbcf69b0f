"""Errors that a user sees: a cause, a remedy, a stable code and the documented exit code.

ShoehornError              1
+-- SettingsError          2  invalid setting, profile or combination of them
+-- DoesNotFitError        3  model does not fit this machine
+-- ModelUnavailableError  4  model, hub, network or volume unavailable
|   `-- HubFailedError        one hub failed; another may be asked (shoehorn.hub.repository)
`-- EngineFailedError      5  engine did not start, or died too often

Rules: the text may change, `code` may not; tests and callers compare `code`, never the text.
"""

from __future__ import annotations

import signal

EXIT_DONE = 0
EXIT_BAD_SETTINGS = 2
EXIT_DOES_NOT_FIT = 3
EXIT_MODEL_UNAVAILABLE = 4
EXIT_ENGINE_FAILED = 5
EXIT_NOT_READ = 128 + signal.SIGPIPE
"""Exit code after the reader of standard output closed it: what a shell reports for SIGPIPE."""


class ShoehornError(Exception):
    """A failure that a user can act on.

    Args:
        cause: `<Subject>: <problem>.`
        remedy: an imperative sentence.
        code: stable name of the problem, as `disk_full`; the class has a default.

    Attributes:
        code: as given, or the default of the class.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, cause: str, remedy: str = "", *, code: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.code = code or type(self).code

    def __str__(self) -> str:
        return f"{self.cause}\n  -> {self.remedy}" if self.remedy else self.cause


class SettingsError(ShoehornError):
    """An invalid setting, profile or combination of them."""

    exit_code = EXIT_BAD_SETTINGS
    code = "invalid_settings"


class DoesNotFitError(ShoehornError):
    """The model does not fit this machine with these settings."""

    exit_code = EXIT_DOES_NOT_FIT
    code = "does_not_fit"


class ModelUnavailableError(ShoehornError):
    """The model is unavailable: hub, network, disk, or a file that failed verification."""

    exit_code = EXIT_MODEL_UNAVAILABLE
    code = "model_unavailable"


class EngineFailedError(ShoehornError):
    """The engine did not start, or died more often than restarts are allowed."""

    exit_code = EXIT_ENGINE_FAILED
    code = "engine_failed"
