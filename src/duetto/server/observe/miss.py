"""A miss of the cache as replies show it. Knows no tenants, only whether there may be others."""

from duetto.core.cache_miss import CacheMiss, MissReason
from duetto.server.http.json_parts import Json


def cache_miss(miss: CacheMiss | None, *, tells_other_salts: bool) -> Json | None:
    """A miss as replies show it.

    That somebody else has the same text is told only where there is nobody else: it would be the
    very thing that salts and tenants keep apart.
    """
    if miss is None:
        return None
    reason, differs_at = miss.reason, miss.differs_at
    if reason is MissReason.OTHER_SALT:
        if tells_other_salts:
            differs_at = None
        else:  # what it would be if nobody else were there
            reason = MissReason.NEVER_SEEN if differs_at is None else MissReason.DIFFERS
    return {"reason": reason.value, "token": miss.token, "differs_at": differs_at}
