"""Trained networks as plain arrays, with everything foldable already folded.

Keras trains on normalised inputs with batch normalisation and dropout. What is shipped takes raw
inputs and holds only convolutions, dense layers and pooling: the input scale is divided into the
first kernel, batch normalisation is multiplied into the convolution before it, and the softmax
temperature is divided into the last dense layer. Both exporters read this form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import keras
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Conv:
    """2-D convolution, zero padding that keeps ceil(size / stride).

    kernel [height, width, in, out], bias [out].
    """

    kernel: Array
    bias: Array
    strides: tuple[int, int]
    relu: bool


@dataclass(frozen=True)
class MaxPool:
    """Largest of each 2x2 block, stride 2."""


@dataclass(frozen=True)
class GlobalMean:
    """Mean over height and width: [1, h, w, c] to [1, c]."""


@dataclass(frozen=True)
class Flatten:
    """[1, h, w, c] to [1, h * w * c], channels last."""


@dataclass(frozen=True)
class Dense:
    """kernel [in, out], bias [out]."""

    kernel: Array
    bias: Array
    relu: bool


Layer = Conv | MaxPool | GlobalMean | Flatten | Dense


@dataclass(frozen=True)
class Network:
    """Layers from an image [1, height, width, channels] in raw units to class logits [1, n].

    `spatial` is (height, width, channels). The last layer is a Dense one without activation.
    """

    spatial: tuple[int, int, int]
    layers: tuple[Layer, ...]

    def with_temperature(self, temperature: float) -> Network:
        """The same network with its logits divided by `temperature` (> 0)."""
        last = self.layers[-1]
        assert isinstance(last, Dense)
        softened = replace(last, kernel=last.kernel / temperature, bias=last.bias / temperature)
        return replace(self, layers=(*self.layers[:-1], softened))


def fold(model: keras.Model, input_scale: Array) -> Network:
    """A trained Keras `model` of inputs divided by `input_scale` ([channels]), for raw inputs.

    Only a scale folds exactly: zero padding must mean the same before and after it, so inputs are
    never shifted. Raises TypeError for a layer that has no counterpart here.
    """
    layers: list[Layer] = []
    for layer in model.layers:
        match layer:
            case keras.layers.Conv2D():
                layers.append(Conv(*_weights(layer), layer.strides, _has_relu(layer)))
            case keras.layers.Dense():
                layers.append(Dense(*_weights(layer), _has_relu(layer)))
            case keras.layers.BatchNormalization():
                layers.append(_fold_batch_norm(layers.pop(), layer))
            case keras.layers.ReLU():
                layers.append(replace(layers.pop(), relu=True))
            case keras.layers.MaxPooling2D():
                layers.append(MaxPool())
            case keras.layers.GlobalAveragePooling2D():
                layers.append(GlobalMean())
            case keras.layers.Flatten():
                layers.append(Flatten())
            case keras.layers.Dropout() | keras.layers.InputLayer():
                pass
            case _:
                raise TypeError(f"no folded form of {type(layer).__name__}")
    return _fold_input_scale(Network(model.input_shape[1:], tuple(layers)), input_scale)


def _weights(layer: keras.layers.Layer) -> tuple[Array, Array]:
    kernel = np.asarray(layer.kernel, dtype=np.float32)
    if layer.bias is None:
        return kernel, np.zeros(kernel.shape[-1], np.float32)
    return kernel, np.asarray(layer.bias, dtype=np.float32)


def _has_relu(layer: keras.layers.Layer) -> bool:
    return layer.activation is keras.activations.relu


def _fold_batch_norm(layer: Layer, norm: keras.layers.BatchNormalization) -> Conv:
    """gamma * (conv(x) - mean) / sqrt(variance + epsilon) + beta, as one convolution."""
    assert isinstance(layer, Conv)
    gain = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    bias = (layer.bias - np.asarray(norm.moving_mean)) * gain + np.asarray(norm.beta)
    return replace(layer, kernel=(layer.kernel * gain).astype(np.float32), bias=bias.astype(np.float32))


def _fold_input_scale(network: Network, scale: Array) -> Network:
    """Divides the first kernel, whose input axis is the last but one, by the channel scales."""
    index = next(i for i, layer in enumerate(network.layers) if isinstance(layer, Conv | Dense))
    first = network.layers[index]
    repeats = first.kernel.shape[-2] // len(scale)  # pixels, if a Flatten comes before a Dense
    kernel = first.kernel / np.tile(scale, repeats)[:, None]
    layers = list(network.layers)
    layers[index] = replace(first, kernel=kernel.astype(np.float32))
    return replace(network, layers=tuple(layers))
