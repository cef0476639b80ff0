"""Know before you run: prices, memory, virtual time and searches. Loads no weights and no torch."""
