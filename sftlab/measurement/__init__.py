"""Measurements of a training step: tokens/s, FLOPs, memory, collectives."""
