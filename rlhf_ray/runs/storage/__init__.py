"""Run folders on a shared or object store.

`location` maps URIs to local paths, `store` reads and writes objects, `folders` transfers whole folders, `lease` decides which
run may write, `mirror` uploads what the driver writes, `rank_files` transfers checkpoint files of other nodes, `session` opens
and reads runs, and `following` keeps local copies of the logs of runs up to date.
"""
