"""From a finished run to a folder that others load, and the proof that it answers as the run."""
