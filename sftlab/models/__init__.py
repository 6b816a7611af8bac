"""Loading a base model, or making a random one."""
