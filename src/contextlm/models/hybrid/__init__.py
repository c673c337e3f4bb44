"""The hybrid: a pattern of mixers, each with a memory of its own. Every mixer is imported here."""

from contextlm.models.hybrid.config import ContextHybridConfig as ContextHybridConfig
from contextlm.models.hybrid.delta import DeltaMixer as DeltaMixer
from contextlm.models.hybrid.gated_convolution import GatedConvolution as GatedConvolution
from contextlm.models.hybrid.global_latents import GlobalLatents as GlobalLatents
from contextlm.models.hybrid.latent import LatentAttention as LatentAttention
from contextlm.models.hybrid.mixer import Mixer as Mixer
from contextlm.models.hybrid.mixer import register_mixer as register_mixer
from contextlm.models.hybrid.model import ContextHybridForCausalLM as ContextHybridForCausalLM
from contextlm.models.hybrid.model import ContextHybridModel as ContextHybridModel
from contextlm.models.hybrid.recurrence import RecurrentMixer as RecurrentMixer
from contextlm.models.hybrid.selective import SelectiveMixer as SelectiveMixer
from contextlm.models.hybrid.window import WindowedAttention as WindowedAttention
