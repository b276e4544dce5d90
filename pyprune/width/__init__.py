"""Narrower layers: MLP channels and attention heads, and the width of the residual stream."""
