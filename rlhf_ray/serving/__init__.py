"""Serving policies through Ray Serve: OpenAI's API, keys, limits, and versions that change under load.

A version is a Serve application of its own (`ray.serve.llm`); the gateway in front of them decides which one answers.
"""
