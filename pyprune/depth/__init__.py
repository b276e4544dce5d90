"""Removing attention and MLP branches and whole layers: search, decision, repacking."""
