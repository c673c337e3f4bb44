"""contextlm: build, train, measure and compare context-compressed language models.

Importing the package registers every architecture with the transformers Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` opens our checkpoints.
"""

import sys

__version__ = "0.1.0"

# The console command registers the models only when a command needs them (see contextlm_script).
if "contextlm_script" not in sys.modules:
    from contextlm import models as models
    from contextlm.compress.input_cache import InputCache as InputCache
