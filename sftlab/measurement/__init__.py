"""What a step takes: tokens a second, FLOPs, memory, collectives."""
