"""Which link: by its address, `shm://` on one machine and `tcp://` beyond it.

NIXL or UCX would be another medium here: `docs/design/cluster.md` says what it must do.
"""

from duetto.cluster.address import check_exposure_of, read_address
from duetto.cluster.links.calls import DEAD_AFTER_S, AcceptLink, LinkListener, connect_by
from duetto.cluster.links.link import LinkEnd, LinkLost, LinkUser
from duetto.cluster.links.medium import Medium
from duetto.cluster.links.shared_memory import SCHEME, SharedMemoryMedium
from duetto.cluster.links.tcp import LINK_FLAG, LinkTLS, TCPMedium
from duetto.cluster.secret import ClusterSecret
from duetto.core.errors import ConfigError

ACCEPTED_LINKS = "accepted: shm://* on one machine, or tcp://HOST:PORT"


def listen_for_links(
    address: str,
    accept: AcceptLink,
    secret: ClusterSecret | None = None,
    *,
    tls: LinkTLS | None = None,
    dead_after_s: float = DEAD_AFTER_S,
) -> LinkListener:
    """`accept` is called for each new link, on a thread of the listener's, and gives who uses it.
    `.address` is what others call. Raises ConfigError."""
    medium = _medium(address, secret, tls, listens=True)
    return LinkListener(medium, accept, secret, dead_after_s)


def connect_link(
    address: str,
    user: LinkUser,
    secret: ClusterSecret | None = None,
    *,
    tls: LinkTLS | None = None,
    dead_after_s: float = DEAD_AFTER_S,
) -> LinkEnd:
    """Takes up to some seconds. Raises LinkLost; nothing has been told to `user` then."""
    try:
        medium = _medium(address, secret, tls, listens=False)
    except ConfigError as error:  # an address that another process gave
        raise LinkLost(str(error)) from None
    return connect_by(medium, user, secret, dead_after_s)


def _medium(
    address: str, secret: ClusterSecret | None, tls: LinkTLS | None, *, listens: bool
) -> Medium:
    if address.startswith(SCHEME):
        return SharedMemoryMedium(address)
    if not address.startswith("tcp://"):
        raise ConfigError(f"{LINK_FLAG} {address!r:.160}: is no KV link; {ACCEPTED_LINKS}")
    place = read_address(address, LINK_FLAG, listens=listens)
    check_exposure_of(place, LINK_FLAG, secret)
    return TCPMedium(place, tls, listens=listens)
