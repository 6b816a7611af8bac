"""Imports the libraries that every training takes, without looking for garbage meanwhile: a sixth
of the time.

Modules stay, so that later collections need not walk over them either.
"""

import gc

gc.disable()
try:
    from peft import PeftModel  # noqa: F401
    from trl import SFTConfig  # noqa: F401
finally:
    gc.enable()
    gc.freeze()
