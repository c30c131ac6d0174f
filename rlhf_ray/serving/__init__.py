"""Serving policies with Ray Serve: OpenAI's API, keys, limits, and versions that are replaced under load.

Each version is a Serve application of its own (`ray.serve.llm`). The gateway in front of them chooses which one
answers a request.
"""
