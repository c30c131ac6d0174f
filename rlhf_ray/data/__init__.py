"""Data: file formats and records, length limits, tokenisation, labels, splits, and the simulated data set."""
