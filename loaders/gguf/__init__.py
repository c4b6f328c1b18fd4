"""GGUF files as model folders: config, tokenizer and an index of the tensors in a file."""
