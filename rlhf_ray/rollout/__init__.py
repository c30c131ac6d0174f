"""Rollout generation: vLLM engines in Ray actors, and the pool that shares requests among them.

Only `engine`, `engine_thread` and `vllm_arguments` import vLLM, and `worker` imports them in the worker's process.
"""
