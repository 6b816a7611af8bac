"""Imported first, for their effect on what is imported after them."""
