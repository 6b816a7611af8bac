"""The chat app without its page."""
