"""`python -m duetto` is the command line."""

from duetto.cli.app import main

main()
