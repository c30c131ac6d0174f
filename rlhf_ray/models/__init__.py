"""Models as the roles see them: token log-probabilities, token values, sequence scores."""
