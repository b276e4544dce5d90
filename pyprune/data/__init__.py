"""Reading what the packaged model and texts are stored as: GGUF, wheels, wiki markup."""
