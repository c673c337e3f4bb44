"""contextlm: build, train, measure and compare context-compressed language models.

Importing the package registers every architecture with the transformers Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` opens our checkpoints.
"""

import sys

__version__ = "0.2.0"

# The command line first sets what libraries read when they are imported, and registers the models
# when a command needs them. It is started by `contextlm_script` or by `python -m contextlm`: Python
# calls a program "-m" until it has found it.
if "contextlm_script" not in sys.modules and sys.argv[:1] != ["-m"]:
    from contextlm import models as models
    from contextlm.compress.checkpoint import compressed_model as compressed_model
    from contextlm.compress.inputs import InputCache as InputCache
    from contextlm.compress.installed import CompressedCache as CompressedCache
