"""The trainer, and going on exactly where it was interrupted."""
