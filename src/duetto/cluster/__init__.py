"""More than one engine: handles of workers, routers, KV links."""
