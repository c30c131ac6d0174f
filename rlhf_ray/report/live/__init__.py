"""The live page: a list of the runs in a folder, and their reports while they grow.

Invariants: it only reads, and only below its folder; pages are drawn by the code of the report; a page whose files have not
changed costs a few `stat` calls and is not sent again.
"""
