"""What makes a step fast:

kernels for packed rows, compiled layers, the fused loss, float8, FSDP2.
"""
