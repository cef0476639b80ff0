"""A checkpoint from the Hugging Face hub, or from its cache: one set of weights, and what is read
beside them.

What a repository holds beside that (other formats, folders, weights under Mistral's names) stays
there. Knows which files are read, and nothing of what is in them.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ResolvedRevision, constants, get_cached_repo_tree
from huggingface_hub import snapshot_download as fetch
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import tqdm

from duetto.checkpoints.config import read_config
from duetto.checkpoints.pooling import MODULES, POOLING, PROMPTS
from duetto.checkpoints.template_files import TEMPLATE_FILE, TOOL_USE_FILE
from duetto.checkpoints.weight_files import (
    ADAPTER_CONFIG,
    INDEX,
    SINGLE,
    files_in_index,
)
from duetto.core.errors import ConfigError
from duetto.core.files import Progress

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEMPLATE_FILE,
    TOOL_USE_FILE,
    MODULES,
    PROMPTS,
    POOLING,
)
_LOOK_S = 0.5  # between two looks at how far a download has come
_MAX_NAMED = 4  # of the files that are missing

Sizes = Mapping[str, int]  # of a repository's files, in bytes


def download(
    name: str,
    revision: str | None = None,
    on_progress: Progress | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The directory of `org/name` at a branch, tag or commit; HF_HUB_OFFLINE=1 looks into the cache
    only. What is in the cache already is not fetched again.

    Raises ConfigError, in one line, if it cannot be had, with what is missing of it.
    """
    return _Repository(name, revision, on_progress, endpoint, cache_dir).download()


class _Repository:
    """One repository at one commit, on the hub and in its cache."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        on_progress: Progress | None,
        endpoint: str | None,
        cache_dir: Path | None,
    ) -> None:
        self._name, self._on_progress = name, on_progress
        self._endpoint = endpoint
        self._cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        self._api = HfApi(endpoint=endpoint)
        self._revision = self._resolve(revision)
        folder = repo_folder_name(repo_id=name, repo_type="model")
        self._blobs = self._cache_dir / folder / "blobs"
        self._snapshot = self._cache_dir / folder / "snapshots" / self._revision.resolved

    def download(self) -> Path:
        sizes = self._files()
        small = [file for file in (*SMALL_FILES, ADAPTER_CONFIG) if file in sizes]
        weights = [SINGLE] if SINGLE in sizes else [INDEX] if INDEX in sizes else []
        # First what tells whether the weights are of any use here.
        index = [file for file in weights if file == INDEX]
        self._fetch(small + index, sizes)
        read_config(self._snapshot)
        if not weights:
            raise ConfigError(f"{self._name}: {_without_weights(sizes)}")
        if "tokenizer.json" not in sizes:
            raise ConfigError(
                f"{self._name}: the repository holds no tokenizer.json, which is needed"
            )
        if index:
            weights = files_in_index(self._snapshot / INDEX)
            if absent := [file for file in weights if file not in sizes]:
                raise ConfigError(f"{self._name}: {INDEX} names {absent[0]}, which is not there")
        self._fetch(weights, sizes)
        return self._snapshot

    def _resolve(self, revision: str | None) -> ResolvedRevision:
        try:
            return self._api.resolve_revision(
                self._name, revision=revision, cache_dir=self._cache_dir
            )
        except GatedRepoError:
            cause = "is gated: ask for access on its page on the hub, then set HF_TOKEN"
        except RepositoryNotFoundError:
            cause = (
                "is neither a directory here nor a model on the hub (a private one needs HF_TOKEN)"
            )
        except RevisionNotFoundError:
            raise ConfigError(
                f"--revision: {revision!r} is no branch, tag or commit of {self._name}"
            ) from None
        except HFValidationError:
            cause = "is neither a directory here nor a name that a model on the hub can have"
        except (RevisionResolutionError, HfHubHTTPError, OSError, ValueError):
            cause = (
                "is not a directory here, and the hub cannot be reached for a model of that name"
            )
        raise ConfigError(f"{self._name}: {cause}")

    def _files(self) -> Sizes:
        """The files of the repository, without those of its folders that are not read."""
        try:
            tree = get_cached_repo_tree(
                self._name, revision=self._revision, cache_dir=self._cache_dir
            )
            sizes = {file.path: file.size for file in tree}
        except CachedRepoTreeNotFoundError:
            try:
                info = self._api.model_info(
                    self._name, revision=self._revision.resolved, files_metadata=True
                )
            except RevisionNotFoundError:
                raise ConfigError(
                    f"--revision: {str(self._revision)!r} is no commit of {self._name}"
                ) from None
            except Exception as error:  # of the hub's client, or of what it stands on
                return self._files_here(error)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return {path: size for path, size in sizes.items() if "/" not in path or path == POOLING}

    def _files_here(self, error: Exception) -> Sizes:
        """Of a cache that others have filled, without a list of what there should be."""
        if not self._snapshot.is_dir():
            raise ConfigError(
                f"{self._name}: is not a directory here, and the hub cannot be reached for a model "
                f"of that name ({_line(error)})"
            ) from None
        found = {file.name: 0 for file in self._snapshot.iterdir() if file.exists()}
        if (self._snapshot / POOLING).exists():
            found[POOLING] = 0
        if INDEX in found:  # all its shards should be here
            found |= dict.fromkeys(files_in_index(self._snapshot / INDEX), 0)
        return found

    def _fetch(self, files: Sequence[str], sizes: Sizes) -> None:
        """Get those that are not in the cache. Raises ConfigError with what is missing then."""
        missing = self._missing(files)
        if not missing:
            return
        interrupted = threading.Event()
        try:
            # Asked once: for a file the client asks a hub that is away for half a minute.
            self._api.model_info(self._name, revision=self._revision.resolved)
            with self._watched(files, sizes):
                _in_a_thread(
                    lambda: fetch(
                        self._name,
                        revision=self._revision,
                        allow_patterns=[_literally(file) for file in missing],
                        tqdm_class=_silent(interrupted),
                        endpoint=self._endpoint,
                        cache_dir=self._cache_dir,
                    )
                )
        except KeyboardInterrupt:
            interrupted.set()
            raise KeyboardInterrupt(self._what_is_missing(files, sizes, "")) from None
        except Exception as error:  # of the hub's client, or of what it stands on
            why = f" ({_line(error)})"
            raise ConfigError(self._what_is_missing(files, sizes, why)) from None
        if self._missing(files):
            raise ConfigError(self._what_is_missing(files, sizes, ""))

    def _missing(self, files: Sequence[str]) -> list[str]:
        return [file for file in files if not (self._snapshot / file).exists()]

    def _what_is_missing(self, files: Sequence[str], sizes: Sizes, why: str) -> str:
        missing = self._missing(files)
        named = ", ".join(
            f"{file} ({_size(sizes[file])})" if sizes[file] else file
            for file in missing[:_MAX_NAMED]
        )
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        return (
            f"{self._name}: the download was interrupted{why}: {len(files) - len(missing)} of "
            f"{len(files)} files are here; missing: {named}{more}; run it again to go on"
        )

    @contextmanager
    def _watched(self, files: Sequence[str], sizes: Sizes) -> Iterator[None]:
        """Tell every now and then how many bytes are here, by what is on the disk."""
        if self._on_progress is None:
            yield
            return
        on_progress, ended = self._on_progress, threading.Event()
        before, total = set(self._unfinished()), sum(sizes[file] for file in files)

        def look() -> None:
            while not ended.wait(_LOOK_S):
                missing = set(self._missing(files))
                done = sum(sizes[file] for file in files if file not in missing)
                begun = sum(_size_on_disk(file) for file in set(self._unfinished()) - before)
                on_progress(min(done + begun, total), total)

        thread = threading.Thread(target=look, name="duetto-download-progress", daemon=True)
        on_progress(0, total)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _unfinished(self) -> list[Path]:
        return list(self._blobs.glob("*.incomplete"))


def _silent(interrupted: threading.Event) -> type[tqdm]:
    """The client's own bar, which draws nothing; an interruption ends the threads that call it."""

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if interrupted.is_set():
                raise ConnectionAbortedError
            super().update(n)

    return Silent


def _in_a_thread(work: Callable[[], Any]) -> None:
    """Wait for `work` so that a Ctrl-C is heard at once: the client itself waits for its files."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="duetto-download", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _without_weights(sizes: Sizes) -> str:
    """What a repository holds that has neither SINGLE nor INDEX."""
    others = sorted(
        f for f in sizes if f.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth"))
    )
    held = f"; it holds {', '.join(others[:_MAX_NAMED])}" if others else ""
    return f"the repository holds neither {SINGLE} nor {INDEX}, which are what is read{held}"


def _literally(file: str) -> str:
    """A pattern that fits this name only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in file)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _size(num_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


def _size_on_disk(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # finished in the meantime
        return 0
