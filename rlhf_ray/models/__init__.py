"""Models as the roles use them: token log-probabilities, token values, sequence scores."""
