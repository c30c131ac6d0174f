"""Metric names, where metrics go besides the run folder (Prometheus, Weights & Biases), alerts, the progress display and timing.

Import from the modules: this package imports none of them, so that a worker that only needs timing loads nothing else.
"""
