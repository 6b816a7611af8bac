"""Makes a launch of one process, when imported, a plain process on one device.

Import it before torch: libraries may look at the devices while they are imported, and what they see
then stays.
"""

from sftlab.config.launch import Launch, settle_single_process

settle_single_process(Launch.from_environment())
