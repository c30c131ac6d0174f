"""Runs as jobs of a Ray cluster: what is packed, what is submitted, how they are watched, stopped and resumed."""
