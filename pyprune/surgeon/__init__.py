"""LLM Surgeon on a whole model: shots, the choice across layers, the state between shots."""
