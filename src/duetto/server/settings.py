"""What the server is told at start-up, finished and frozen. The engine's part is not here."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duetto.core.embeddings import EmbeddingModel
from duetto.core.errors import ConfigError, InvalidRequest
from duetto.core.reuse_choice import ReuseRules
from duetto.core.sampling_params import SEED_RANGE, SamplingParams
from duetto.engine.watchdog import StepTimeout
from duetto.server.http.origins import Origins

DAY_S = 86_400.0
STORED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Raises ConfigError, naming the setting, for a value that cannot work."""

    served_model_name: str  # the one that replies show
    other_model_names: tuple[str, ...] = ()  # that mean the same model
    accepts_any_model: bool = False  # whatever a request calls it
    version: str = "0"
    default_sampling: Mapping[str, Any] = field(default_factory=dict)  # generation_config's part
    model_root: str | None = None  # where the weights came from; only its digest is shown
    dtype: str = "unknown"  # of weights; this and the next three change answers, and are shown
    quantization: str = "none"
    kv_cache_dtype: str = "unknown"
    backend: str = "unknown"
    max_drafts: Mapping[str, int] = field(default_factory=dict)  # of a request's step, by method
    reuse: ReuseRules = field(default_factory=ReuseRules)
    embeddings: EmbeddingModel | None = None  # what the model gives, if that is not answers
    seed: int | None = None  # of requests that bring none; None: drawn for each
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()  # of web pages; none: those of this machine
    only_local_hosts: bool = False  # refuse a Host header that does not name this machine
    max_num_queued_reqs: int = 256  # waiting beside those that run; more are refused with 503
    max_answers: int = 256  # prompts times n of one HTTP request
    max_body_bytes: int = 4 * 2**20
    max_held_bytes: int = 64 * 2**20  # of large bodies that are being read and tokenized
    max_reply_bytes: int = 128 * 2**20  # that one reply could take which is not streamed
    max_replies_bytes: int = 2**30  # that all of them could take together
    max_pending_bytes: int = 64 * 1024  # of one stream whose client takes nothing
    max_stored_bytes: int = STORED_BYTES  # of responses that can be asked for again; 0: none are
    stored_ttl_s: float = 30 * DAY_S
    sse_keep_alive_s: float = 15.0  # a comment is sent into a stream that was silent this long
    body_timeout_s: float = 30.0
    step_timeout_s: StepTimeout = "auto"  # of one step, after which the engine counts as hung
    stall_timeout_s: float = 120.0  # the same if there is work, and no step is begun for so long
    shutdown_timeout_s: float = 30.0  # running requests may take this long to end

    def __post_init__(self) -> None:
        self._check_names()
        for name in ("max_answers", "max_body_bytes", "max_held_bytes", "max_pending_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be 1 or more")
        if self.max_num_queued_reqs < 0:
            raise ConfigError("--max-num-queued-reqs: must be 0 or more")
        for name, seconds in (
            ("--sse-keep-alive-interval", self.sse_keep_alive_s),
            ("body_timeout_s", self.body_timeout_s),
            ("stall_timeout_s", self.stall_timeout_s),
        ):
            if not 0 < seconds <= DAY_S:
                raise ConfigError(f"{name}: must be above 0 and at most {DAY_S:g} seconds")
        timeout = self.step_timeout_s
        is_time = isinstance(timeout, float | int) and 0 < timeout <= DAY_S
        if not is_time and timeout not in ("auto", "off"):
            raise ConfigError(
                f"--step-timeout-s: must be auto, off, or above 0 and at most {DAY_S:g} seconds"
            )
        if not 0 <= self.shutdown_timeout_s <= DAY_S:
            raise ConfigError(f"--shutdown-timeout: must be from 0 to {DAY_S:g} seconds")
        if self.seed is not None and not SEED_RANGE[0] <= self.seed <= SEED_RANGE[1]:
            raise ConfigError(f"--seed: must be from {SEED_RANGE[0]} to {SEED_RANGE[1]}")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ConfigError("--api-key: a key must be ASCII text without spaces around it")
        Origins(self.allowed_origins)
        try:
            SamplingParams(**self.default_sampling)
        except (InvalidRequest, TypeError) as error:
            raise ConfigError(f"generation_config.json: {error}") from None

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.served_model_name, *self.other_model_names)

    def _check_names(self) -> None:
        names = self.model_names
        if not all(name.strip() for name in names):
            raise ConfigError("--served-model-name: must not be empty")
        if len(set(names)) < len(names):
            raise ConfigError(f"--served-model-name: a name is there twice: {', '.join(names)}")

    @property
    def system_fingerprint(self) -> str:
        """Names what produces the answers, so that a change of it can be seen."""
        what = (
            *(self.version, self.served_model_name, self.model_root),
            *(self.dtype, self.quantization, self.kv_cache_dtype, self.backend),
        )
        return "fp_" + hashlib.sha256(repr(what).encode()).hexdigest()[:12]
