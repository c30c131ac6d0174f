"""The generation role: vLLM engines as Ray actors, the pool that dispatches to them, and how new weights reach them.

Nothing here imports vLLM when it is imported, apart from `engine` and `weights.reload`, which only worker processes
load.
"""
