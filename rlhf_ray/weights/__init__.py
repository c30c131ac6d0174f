"""How the learner's weights reach the rollout workers, and how a worker shows that it has received them."""
