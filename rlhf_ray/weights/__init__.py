"""How a new policy travels from the learners to the rollout workers, and how a worker proves that it has it."""
