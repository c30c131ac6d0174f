"""The live page: the runs of a folder and the curves of the report, while they grow.

Invariants: it only reads, and only below the folder that it was given; what it shows is drawn by the report's own code;
a page behind which nothing has changed costs a few `stat` calls and is not sent again.
"""
