"""The trainer, its checks of what runs, and exact resuming after an interruption."""
