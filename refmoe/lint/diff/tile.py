"""Tile matrices of two checkpoints alike."""

TILE = 1 << 20
