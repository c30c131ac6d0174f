"""Runs as jobs of a Ray cluster: packing, submitting, watching, stopping and resuming them."""
