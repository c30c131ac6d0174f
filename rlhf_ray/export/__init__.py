"""Exporting a trained model as a folder to share: safetensors, tokenizer, and a model card."""
