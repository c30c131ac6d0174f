"""Rollouts as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_ray.batch import Batch, pack_sequences
from rlhf_ray.types import Rollout


def sequences(rollouts: Sequence[Rollout]) -> Batch:
    """Prompt and what follows it of each rollout; the targets are the tokens that the policy chose."""
    return pack_sequences(
        [np.concatenate([r.prompt.token_ids, r.token_ids]) for r in rollouts],
        [np.concatenate([np.zeros(len(r.prompt.token_ids), dtype=bool), r.chosen]) for r in rollouts],
    )
