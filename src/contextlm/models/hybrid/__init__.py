"""The hybrid: a pattern of mixers, each with a memory of its own."""

from contextlm.models.hybrid.model import ContextHybridConfig as ContextHybridConfig
from contextlm.models.hybrid.model import ContextHybridForCausalLM as ContextHybridForCausalLM
from contextlm.models.hybrid.model import ContextHybridModel as ContextHybridModel
