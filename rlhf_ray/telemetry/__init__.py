"""What a run leaves behind and what a person sees of it: the run folder, its logs, the progress display and the report.

Invariants: one process at a time writes to a run folder; every step of a stage is recorded exactly once, whatever
crashed and was resumed; every file is valid JSON Lines but for a last line that a crash may have torn, which readers
skip. Import from the modules: this package imports none of them, so that a worker that only times itself loads no
TensorBoard.
"""
