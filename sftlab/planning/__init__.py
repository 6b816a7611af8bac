"""Before a launch: does it fit, how fast will it be, what is missing on this machine?"""
