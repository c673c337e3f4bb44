"""DCA-LLM: a local window and one representative for each half window before it."""

from contextlm.models.dual_context.model import DualContextConfig as DualContextConfig
from contextlm.models.dual_context.model import DualContextForCausalLM as DualContextForCausalLM
from contextlm.models.dual_context.model import DualContextModel as DualContextModel
