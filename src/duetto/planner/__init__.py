"""Layouts, objectives and searches: the cheapest way to serve a load."""
