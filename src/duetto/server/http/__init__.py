"""What every HTTP request meets: the wire, limits, keys, bodies. Knows no API."""
