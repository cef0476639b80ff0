"""Every error that Duetto raises on purpose.

    DuettoError
    ├── ConfigError          start-up cannot go on: a flag, a pair of flags, a file
    │   └── CheckpointError  a model directory that cannot be served, with the file at fault
    ├── InvalidRequest       one request is refused, with the field at fault
    │   └── RequestTooLong   ... because it can never fit
    └── EngineError          the engine failed while it computed; the message is safe to show
        ├── RefusedOutput    ... as a step gave something else than was asked of it
        └── DeviceLost       ... as the device that computes is gone, for good
            └── PartLost     ... or the process of a part of the model

What was wrong, where, and what would be accepted: each message says all three.
"""

from pathlib import Path


class DuettoError(Exception):
    """Base of all errors raised on purpose; anything else that escapes is a bug."""


class ConfigError(DuettoError):
    """Start-up cannot go on. The command line prints the message as one line and exits with 1."""


class CheckpointError(ConfigError):
    """A model directory cannot be served."""

    def __init__(self, file: Path | str, cause: str) -> None:
        super().__init__(f"{file}: {cause}")
        self.file = Path(file)
        self.cause = cause


class InvalidRequest(DuettoError, ValueError):
    """A request is refused before anything is computed for it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class RequestTooLong(InvalidRequest):
    """A request that could never fit, whatever else runs.

    The words are OpenAI's: clients look for them, and shorten what they send.
    """

    def __init__(
        self,
        field: str,
        *,
        limit: int,
        num_prompt: int,
        num_output: int,
        is_lower_bound: bool = False,
        cause: str = "",
    ) -> None:
        """All in tokens. `limit` is for prompt and answer together; `num_prompt` may be only known
        to be reached (`is_lower_bound`); `cause` is a sentence, if it is not the model's limit."""
        least = "at least " if is_lower_bound else ""
        self._said = (
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{least}{num_prompt + num_output} tokens ({least}{num_prompt} in the %s, {num_output} "
            f"in the completion). Please reduce the length of the %s or completion."
        )
        self._cause = f" {cause}" if cause else ""
        super().__init__(field, self.message_of("prompt"))

    def message_of(self, prompt: str) -> str:
        """The message to a caller who sent what `prompt` names: "prompt" or "messages"."""
        return self._said % (prompt, prompt) + self._cause


class EngineError(DuettoError):
    """The engine failed while it computed this request. The message carries no internals."""


class RefusedOutput(EngineError):
    """What an executor returned for a step is not what the step was to give."""


class DeviceLost(EngineError):
    """The device computes nothing any more, in this process: it fell off the bus, or a kernel read
    what is not its own."""

    def __init__(self, device: str, cause: str) -> None:
        super().__init__(f"the device {device} is lost, and the engine ends: {cause}")


class PartLost(DeviceLost):
    """The process that computes a part of the model (--tp, --pp) has ended, or hangs."""

    def __init__(self, part: str, cause: str) -> None:
        EngineError.__init__(self, f"{part} of the model is lost, and the engine ends: {cause}")


# What ends a process or a generator on purpose, or an engine for want of a device. Everything else
# that native code raises, a panic (which is no Exception) among it, concerns the work that it was
# doing.
STOPS_THE_PROCESS = (KeyboardInterrupt, SystemExit, GeneratorExit, DeviceLost)
