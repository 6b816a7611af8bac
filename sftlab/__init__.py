"""The nouns that the scripts under recipes/, eval/, app/ and slurm/ share."""
