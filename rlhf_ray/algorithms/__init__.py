"""The mathematics of RLHF: pure functions of tensors and pure state machines. No Ray, no engine, no input or output.

Invariants that hold in every module here:

- A mask says which tokens the policy sampled; it may have holes (tokens of a tool or an environment). What lies at a
  masked position is never read: any value there, NaN and infinity included, changes neither a result nor a gradient.
- Losses are per token. `aggregation` turns the masks of the *whole* minibatch into weights, and the loss is
  `sum(weights * loss)`; so micro-batches, ranks, padding and packing cannot change a gradient.
- Per-token functions are elementwise: they take padded `[B, T]` tensors and flat (packed) `[N]` tensors alike.
  Functions that look along a sequence (`gae`, `token_rewards`, weights by sequence) take `[B, T]`, one sequence a row.
- Log-probabilities are in nats, after the sampling temperature.
"""
