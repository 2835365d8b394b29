"""The layers, under their public name: modules and parameters, dense and routed layers, attention."""

from minimoe.layers.attention import Attention as Attention
from minimoe.layers.cache import KeyValueCache as KeyValueCache
from minimoe.layers.dense import Dropout as Dropout
from minimoe.layers.dense import Embedding as Embedding
from minimoe.layers.dense import FeedForward as FeedForward
from minimoe.layers.dense import Linear as Linear
from minimoe.layers.dense import Norm as Norm
from minimoe.layers.latent_attention import LatentAttention as LatentAttention
from minimoe.layers.module import Module as Module
from minimoe.layers.module import Parameter as Parameter
from minimoe.layers.moe import MoE as MoE
