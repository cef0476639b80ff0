"""A checkpoint from the Hugging Face hub, or from its cache. Knows no format of what it fetches."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from duetto.core.errors import ConfigError

FILES = ("*.json", "*.safetensors", "*.jinja")  # what is needed to serve; never a pickle


def download(name: str) -> Path:
    """The directory of `org/name`; HF_HUB_OFFLINE=1 looks into the cache only.

    Raises ConfigError, in one line, if it cannot be had.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except RepositoryNotFoundError:
        cause = "is neither a directory here nor a model on the hub"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        cause = "is not a directory here, and the hub cannot be reached for a model of that name"
    raise ConfigError(f"{name}: {cause}")
