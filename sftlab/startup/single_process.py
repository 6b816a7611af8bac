"""Turns a launch of one process into a plain process on one device, when it is imported.

Import it before torch, because libraries may look at the devices during their import.
"""

from sftlab.config.launch import Launch, force_single_process

force_single_process(Launch.from_environment())
