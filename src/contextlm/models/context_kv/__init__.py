"""Context-KV: attention over a few past contexts."""

from contextlm.models.context_kv.model import ContextKVConfig as ContextKVConfig
from contextlm.models.context_kv.model import ContextKVForCausalLM as ContextKVForCausalLM
from contextlm.models.context_kv.model import ContextKVModel as ContextKVModel
