"""What `--speculative-config` says: who proposes drafts, and how. Knows no models and no prices.

Names and meanings are vLLM's, where it has them. Whatever is said here, no answer changes: a draft
is accepted only if it is the token that the request would have drawn anyway.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast, get_args

from duetto.core.errors import ConfigError
from duetto.core.near import near_misses

Method = Literal["ngram", "suffix", "draft_model"]
METHODS: tuple[Method, ...] = get_args(Method)

FLAG = "--speculative-config"
MODEL_FLAG = "--speculative-model"
MAX_DRAFTS = 16  # of one request in one step: acceptance is known for so many places

_ABSENT_METHODS = (
    "eagle",
    "eagle3",
    "medusa",
    "mlp_speculator",
    "mtp",
    "dflash",
    "dspark",
    "extract_hidden_states",
    "ngram_gpu",
    "custom_class",
)
# What vLLM also takes, and what of it is true here: these values only, which then change nothing.
_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "draft_tensor_parallel_size": (None, 1),
    "enforce_eager": (None, True, False),
    "disable_padded_drafter_batch": (None, True, False),
    "parallel_drafting": (None, False),
    "use_heterogeneous_vocab": (None, False),
    "enable_adaptive_verification": (None, True, False),
    "rejection_sample_method": (None, "standard"),
    "draft_sample_method": (None, "greedy", "probabilistic"),
}
_QUANTIZATIONS = ("int8", "int4", "fp8", "none")
_EVERY = ("method", "num_speculative_tokens")
_OWN: Mapping[Method, tuple[str, ...]] = {
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
    "suffix": (
        "suffix_decoding_max_tree_depth",
        "suffix_decoding_max_cached_requests",
        "suffix_decoding_max_spec_factor",
        "suffix_decoding_min_token_prob",
    ),
    "draft_model": ("model", "revision", "quantization", "kv_cache_dtype", "max_model_len"),
}

_T = TypeVar("_T", int, float, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramOptions:
    """Drafts are what followed the last tokens where they stood before, in prompt or answer."""

    num_speculative_tokens: int = 16  # at most in one step; the policy asks for as many as pay
    prompt_lookup_min: int = 2  # tokens that must be alike, at least
    prompt_lookup_max: int = 8  # ... and the most that are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixOptions:
    """The same over the answers of the tenant's earlier requests, and over the request itself."""

    num_speculative_tokens: int = 16
    suffix_decoding_max_tree_depth: int = 24  # tokens that are alike, and drafts, together
    suffix_decoding_max_cached_requests: int = 10_000  # per tenant; 0: only the request itself
    suffix_decoding_max_spec_factor: float = 1.0  # drafts per token that is alike
    suffix_decoding_min_token_prob: float = 0.1  # of a draft, by counting, with those before it


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModelOptions:
    """A smaller model with the same tokenizer."""

    model: str  # a directory, a model that ships, or org/name
    num_speculative_tokens: int = 8
    revision: str | None = None
    quantization: str | None = None  # None: as the target
    kv_cache_dtype: str | None = None  # None: as the target
    max_model_len: int | None = None  # longer requests have no drafts from it; None: its own


MethodOptions = NgramOptions | SuffixOptions | DraftModelOptions


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """One entry per method, in the order in which they were named. Made by `parse`."""

    methods: Mapping[Method, MethodOptions]

    @classmethod
    def parse(
        cls, config: str | Mapping[str, Any] | list[Any] | None, model: str | None = None
    ) -> "SpeculativeConfig | None":
        """What `--speculative-config` (JSON text, or what it stands for: an object, or a list of
        them) and `--speculative-model` say together; None if neither is given.

        Raises ConfigError in one line that names the flag, what was wrong and what is accepted.
        """
        given = [] if config is None else _objects(config)
        if model is not None:
            given = _with_model(given, model)
        if not given:
            return None
        methods: dict[Method, MethodOptions] = {}
        for each in given:
            method = _method_of(each)
            if method in methods:
                raise ConfigError(f"{FLAG}: method {method} twice; give each once")
            methods[method] = _options(method, each)
        return cls(methods)

    @property
    def draft_model(self) -> DraftModelOptions | None:
        options = self.methods.get("draft_model")
        return options if isinstance(options, DraftModelOptions) else None

    @property
    def max_drafts(self) -> Mapping[str, int]:
        """The most drafts of one request in one step, by method."""
        return {m: options.num_speculative_tokens for m, options in self.methods.items()}


def _objects(config: object) -> list[Mapping[str, Any]]:
    if isinstance(config, str):
        try:
            config = json.loads(config, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{FLAG}: is not JSON ({error}); {_example()}") from None
    listed = config if isinstance(config, list | tuple) else [config]
    if not listed or not all(isinstance(each, Mapping) for each in listed):
        raise ConfigError(
            f"{FLAG}: must be an object or a list of some, not {_shown(config)}; {_example()}"
        )
    return listed if isinstance(listed, list) else list(listed)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name twice in one object")
    return made


def _with_model(given: list[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
    """`--speculative-model` alone is a draft model; beside a draft_model without one, its model."""
    if not isinstance(model, str) or not model:
        raise ConfigError(
            f"{MODEL_FLAG}: must be a directory or a model's name, not {_shown(model)}"
        )
    places = [i for i, each in enumerate(given) if _names_draft_model(each)]
    if not places:
        return [*given, {"method": "draft_model", "model": model}]
    if any(given[i].get("model") is not None for i in places):
        raise ConfigError(f"{MODEL_FLAG} with a model in {FLAG}: name the draft model once")
    return [{**each, "model": model} if i in places else each for i, each in enumerate(given)]


def _names_draft_model(given: Mapping[str, Any]) -> bool:
    """As in vLLM, a model without a method is a draft model."""
    name = given.get("method")
    return name == "draft_model" or (name is None and given.get("model") is not None)


def _method_of(given: Mapping[str, Any]) -> Method:
    if _names_draft_model(given):
        return "draft_model"
    name = given.get("method")
    accepted = ", ".join(METHODS)
    if name is None:
        raise ConfigError(f"{FLAG}: method is missing: one of {accepted}")
    if name in METHODS:
        return cast(Method, name)
    if isinstance(name, str) and (name in _ABSENT_METHODS or name.endswith("_mtp")):
        raise ConfigError(f"{FLAG}: method {name} is not one that Duetto has; it has {accepted}")
    near = near_misses(name, METHODS) if isinstance(name, str) else ""
    raise ConfigError(f"{FLAG}: method {_shown(name)} is not one of {accepted}{near}")


def _options(method: Method, given: Mapping[str, Any]) -> MethodOptions:
    _check_names(method, given)
    reader = _Reader(method, given)
    if method == "ngram":
        return _ngram(reader)
    if method == "suffix":
        return _suffix(reader)
    return _draft_model(reader)


def _check_names(method: Method, given: Mapping[str, Any]) -> None:
    own = (*_EVERY, *_OWN[method])
    for name, value in given.items():
        if name in own:
            continue
        if name in _HARMLESS:
            if (type(value), value) not in [(type(each), each) for each in _HARMLESS[name]]:
                shown = ", ".join(json.dumps(v) for v in _HARMLESS[name] if v is not None)
                _refuse(name, f"must be {shown} or left out, not {_shown(value)}")
            continue
        for other, names in _OWN.items():
            if name in names and value is not None:
                _refuse(name, f"is an option of method {other}, not of {method}")
        if not any(name in names for names in _OWN.values()):
            near = near_misses(name, own) if isinstance(name, str) else ""
            _refuse(name, f"is not an option of method {method}: {', '.join(own)}{near}")


def _ngram(reader: "_Reader") -> NgramOptions:
    """vLLM's rule for one bound without the other is that both are alike; here the other one is
    its default, as far as that lets the pair be in order."""
    plain = NgramOptions()
    least = reader.whole("prompt_lookup_min", None, 1, 64)
    most = reader.whole("prompt_lookup_max", None, 1, 64)
    if least is None:
        least = min(plain.prompt_lookup_min, most or plain.prompt_lookup_min)
    if most is None:
        most = max(plain.prompt_lookup_max, least)
    if least > most:
        _refuse("prompt_lookup_min", f"{least} is more than prompt_lookup_max, {most}")
    return NgramOptions(
        num_speculative_tokens=reader.num_drafts(plain.num_speculative_tokens),
        prompt_lookup_min=least,
        prompt_lookup_max=most,
    )


def _suffix(reader: "_Reader") -> SuffixOptions:
    plain, prefix = SuffixOptions(), "suffix_decoding_"
    depth, cached = plain.suffix_decoding_max_tree_depth, plain.suffix_decoding_max_cached_requests
    factor, least = plain.suffix_decoding_max_spec_factor, plain.suffix_decoding_min_token_prob
    most = reader.number(f"{prefix}max_spec_factor", factor, 0.0, 100.0)
    if not most:
        _refuse(f"{prefix}max_spec_factor", "0 never drafts; give more, or leave the method out")
    return SuffixOptions(
        num_speculative_tokens=reader.num_drafts(plain.num_speculative_tokens),
        suffix_decoding_max_tree_depth=reader.whole(f"{prefix}max_tree_depth", depth, 4, 128),
        suffix_decoding_max_cached_requests=reader.whole(
            f"{prefix}max_cached_requests", cached, 0, 10**6
        ),
        suffix_decoding_max_spec_factor=most,
        suffix_decoding_min_token_prob=reader.number(f"{prefix}min_token_prob", least, 0.0, 1.0),
    )


def _draft_model(reader: "_Reader") -> DraftModelOptions:
    model = reader.text("model")
    if model is None:
        _refuse("model", f"is missing: method draft_model needs one, here or as {MODEL_FLAG}")
    return DraftModelOptions(
        model=model,
        num_speculative_tokens=reader.num_drafts(8),
        revision=reader.text("revision"),
        quantization=reader.choice("quantization", _QUANTIZATIONS),
        kv_cache_dtype=reader.text("kv_cache_dtype"),
        max_model_len=reader.whole("max_model_len", None, 1, 2**31),
    )


class _Reader(NamedTuple):
    """One object's values, each checked; null is as if it were not there."""

    method: Method
    given: Mapping[str, Any]

    def num_drafts(self, default: int) -> int:
        count: int = self.whole("num_speculative_tokens", default, 1, MAX_DRAFTS)
        return count

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        """A whole number, or the default."""
        return self._bounded(name, default, low, high, "whole number", lambda v: type(v) is int)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        def is_number(value: object) -> bool:
            return type(value) is int or (type(value) is float and math.isfinite(value))

        return float(self._bounded(name, default, low, high, "number", is_number))

    def text(self, name: str) -> str | None:
        value = self.given.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            _refuse(name, f"must be a text that is not empty, not {_shown(value)}")
        return value

    def choice(self, name: str, accepted: tuple[str, ...]) -> str | None:
        value = self.text(name)
        if value is not None and value not in accepted:
            near = near_misses(value, accepted)
            _refuse(name, f"{_shown(value)} is not one of {', '.join(accepted)}{near}")
        return value

    def _bounded(
        self,
        name: str,
        default: _T | None,
        low: float,
        high: float,
        kind: str,
        is_right: Callable[[object], bool],
    ) -> Any:
        value = self.given.get(name)
        if value is None:
            return default
        if not is_right(value) or not low <= value <= high:
            _refuse(name, f"must be a {kind} from {low:.0f} to {high:.0f}, not {_shown(value)}")
        return value


def _refuse(name: object, cause: str) -> NoReturn:
    shown = name[:80] if isinstance(name, str) and name.isprintable() else _shown(name)
    raise ConfigError(f"{FLAG}: {shown} {cause}")


def _shown(value: object) -> str:
    """The beginning of it. Of a number, Python writes a few thousand digits, and no more."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a number of thousands of digits"


def _example() -> str:
    return """as '{"method": "ngram", "num_speculative_tokens": 8}'"""
