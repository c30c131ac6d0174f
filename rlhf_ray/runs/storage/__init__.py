"""Run folders on a shared or object store: `location` (URIs and where they lie on a node), `store` (objects), `folders` (whole
folders), `lease` (who may write), `mirror` (what the driver writes goes there), `session` (all of it, for a run)."""
