"""The mathematics of RLHF: pure functions of tensors and pure state machines. No Ray, no models, no files. `registry` lists the
advantage estimators and policy losses that a config can name.

Invariants that hold in every module here:

- A mask marks the tokens that the policy sampled; it may have holes (tokens of a tool or an environment). Values at masked
  positions are never read: any value there, including NaN and infinity, changes neither a result nor a gradient.
- Losses are per token. `aggregation` turns the masks of the *whole* minibatch into weights, and the loss is
  `sum(weights * loss)`; so micro-batches, ranks, padding and packing cannot change a gradient.
- Per-token functions are elementwise: they take padded `[B, T]` tensors and flat (packed) `[N]` tensors alike.
  Functions that look along a sequence (`gae`, `token_rewards`, weights by sequence) take `[B, T]`, one sequence per row.
- Log-probabilities are in nats, after the sampling temperature.
"""
