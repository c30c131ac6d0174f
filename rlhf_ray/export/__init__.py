"""A trained model as a folder to give away: safetensors, tokenizer, and a card that says where it comes from."""
