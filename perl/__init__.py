"""PERL: RLHF in which every learned part is a LoRA adapter on one frozen base."""

import logging

__version__ = "0.1.0"

# Where these are installed, peft and TRL import them, and at that they warn: of a kernel that there could be,
# and that a machine without a GPU has none.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in record.getMessage())
