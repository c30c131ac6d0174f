"""Data: records and their file formats, tokenisation, splits, and the simulated-annotator data set."""
