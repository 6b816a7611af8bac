"""Which recipe and launch config does this run have, and do they agree?"""
