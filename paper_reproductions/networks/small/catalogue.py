"""The small networks by name, each with the least share of its parameters that can be cut.

A share counts the parameters in leaves with an axis of which units can be cut.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from paper_reproductions.networks.small import attention, convolutional, frameworks, others, recurrent

_SINGLE = 1e-6  # Keras computes variances in float32


class Entry(NamedTuple):
    """make() -> Network, in float64. share: the least that can be cut. needs: a package. large: seconds, not tenths.

    within: by how much of the largest output rounding may part two ways to compute it, 1e-12 in float64.
    """

    make: Callable[[], Any]
    share: float = 1.0
    needs: str = ""
    large: bool = False
    within: float = 1e-12


NETWORKS = {
    "llama": Entry(attention.llama),
    "opt": Entry(attention.opt),
    "minilm": Entry(attention.minilm, 0.9),
    "gpt": Entry(attention.gpt),
    "alibi": Entry(attention.alibi),
    "interleaved rotary": Entry(attention.interleaved),
    "encoder and decoder": Entry(attention.translator),
    "experts": Entry(attention.experts),
    "ragged experts": Entry(attention.ragged),
    "vision transformer": Entry(attention.vision, 0.99),
    "mixer": Entry(attention.mixer, 0.97),
    "attention pooling": Entry(attention.pooling),
    "decoding step": Entry(attention.cached),
    "mamba": Entry(recurrent.mamba),
    "mamba 2": Entry(recurrent.mamba2),
    "linear recurrent unit": Entry(recurrent.lru),
    "qrnn": Entry(recurrent.qrnn),
    "lstm": Entry(recurrent.lstm),
    "gru": Entry(recurrent.gru),
    "rwkv": Entry(recurrent.rwkv),
    "u-net": Entry(convolutional.unet),
    "vae": Entry(convolutional.vae, 0.97),
    "resnext": Entry(convolutional.resnext),
    "inverted residuals": Entry(convolutional.mobile),
    "separable": Entry(convolutional.separable, 0.98),
    "densenet": Entry(convolutional.densenet),
    "padded shortcuts": Entry(convolutional.resnet, 0.99),
    "group norm": Entry(convolutional.group_norm),
    "instance norm": Entry(convolutional.instance_norm),
    "convnext": Entry(convolutional.convnext, 0.99),
    "wavenet": Entry(convolutional.wavenet),
    "graph": Entry(others.graph, 0.99),
    "graph attention": Entry(others.graph_attention),
    "ensemble": Entry(others.ensemble),
    "weight norm": Entry(others.weight_norm, 0.0),
    "highway": Entry(others.highway),
    "recommender": Entry(others.recommender, 0.99),
    "siamese": Entry(others.siamese),
    "custom derivatives": Entry(others.derivatives),
    "radiance field": Entry(others.radiance, 0.98),
    "adapters": Entry(others.adapters),
    "factorised": Entry(others.factorised),
    "linen cnn": Entry(frameworks.linen_cnn, 0.99, needs="flax"),
    "linen transformer": Entry(frameworks.linen_transformer, 0.98, needs="flax"),
    "linen recurrent": Entry(frameworks.linen_recurrent, 0.99, needs="flax"),
    "nnx cnn": Entry(frameworks.nnx_cnn, 0.99, needs="flax"),
    "nnx transformer": Entry(frameworks.nnx_transformer, needs="flax"),
    "equinox mlp": Entry(frameworks.equinox_mlp, 0.97, needs="equinox"),
    "equinox cnn": Entry(frameworks.equinox_cnn, 0.99, needs="equinox"),
    "equinox transformer": Entry(frameworks.equinox_transformer, 0.99, needs="equinox"),
    "equinox recurrent": Entry(frameworks.equinox_recurrent, 0.99, needs="equinox"),
    "keras attention": Entry(frameworks.keras_attention, 0.99, needs="keras", within=_SINGLE),
    "haiku transformer": Entry(frameworks.haiku_transformer, 0.98, needs="haiku"),
    "haiku cnn": Entry(frameworks.haiku_cnn, 0.98, needs="haiku"),
    "keras MobileNetV2": Entry(frameworks.mobilenet, 0.9, needs="keras", large=True, within=_SINGLE),
    "keras EfficientNetB0": Entry(frameworks.efficientnet, 0.9, needs="keras", large=True, within=_SINGLE),
    "keras DenseNet121": Entry(frameworks.densenet121, 0.9, needs="keras", large=True, within=_SINGLE),
    "keras ConvNeXtTiny": Entry(frameworks.convnext_tiny, 0.9, needs="keras", large=True, within=_SINGLE),
    "keras ResNet50V2": Entry(frameworks.resnet50, 0.9, needs="keras", large=True, within=_SINGLE),
}
