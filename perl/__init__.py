"""PERL: RLHF in which every learned part is a LoRA adapter on one frozen base."""

import logging

__version__ = "0.1.0"

# Where bitsandbytes is installed peft imports it, and at its import it warns of a kernel that there could be.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
