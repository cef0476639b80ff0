"""Numbers that look drawn and are not: a hash of a pair, for simulations without a random state."""

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for each pair: SplitMix64 (Steele, Lea and Flood, 2014) of both."""
    mixed = _mix(_mix(seed & _MASK) ^ position)
    return (mixed >> 11) / 2**53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
