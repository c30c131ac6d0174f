"""The driver: the loop, its buffer and admission, and what it must remember to go on after a crash."""
