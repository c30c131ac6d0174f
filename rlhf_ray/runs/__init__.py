"""The run folder and everything in it: metrics, events, samples, ledger, checkpoints, status. `storage/` keeps it on a store.

Invariants: one process at a time writes to a run folder; every step of a stage is recorded exactly once, whatever crashed and was
resumed; every log is valid JSON Lines except for a last line that a crash may have cut short, which readers skip.
"""
