"""A server's address as people type it."""

from urllib.parse import urlsplit

from duetto.core.errors import ConfigError


def server_url(flag: str, text: str) -> str:
    """`localhost:8000`, `http://host:8000/v1/`, `https://host/path`: with a scheme, and without
    the /v1 that each request's path begins with.

    Raises ConfigError, naming the flag, for what is no address of a server.
    """
    url = text.strip()
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address &= parts.port != 0 and not any(each.isspace() for each in url)
    except ValueError:  # a port that is no number, or brackets that do not close
        is_address = False
    if not is_address:
        raise ConfigError(f"{flag} {text:.80}: must be a server's address, like 127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
