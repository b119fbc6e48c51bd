"""Writes a folded network as TensorFlow Lite or as ONNX, ending in a softmax, batch fixed at 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import tensorflow as tf
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from training.graph import Conv, Dense, Flatten, GlobalMean, MaxPool, Network

ONNX_OPSET = 13
ONNX_IR_VERSION = 8  # the oldest that carries this opset, so that old runtimes load the file
OUTPUT_NAME = "probabilities"


def to_int8_tflite(network: Network, name: str, shape: Sequence[int], samples: NDArray[np.float32]) -> bytes:
    """Full-integer TensorFlow Lite: int8 in and out, ranges calibrated on `samples`.

    Convolution weights have one scale per output channel; dense weights have one scale per
    tensor, because older TensorFlow Lite Micro kernels know no other. `samples` is [n, *shape[1:]]
    in raw units, `shape` the canonical input shape with its leading 1.
    """
    converter = _converter(network, name, shape)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.int8
    converter.inference_output_type = tf.int8
    converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    return bytes(converter.convert())


def to_float16_tflite(network: Network, name: str, shape: Sequence[int]) -> bytes:
    """TensorFlow Lite with float16 weights and float32 input and output."""
    converter = _converter(network, name, shape)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    return bytes(converter.convert())


def _converter(network: Network, name: str, shape: Sequence[int]) -> tf.lite.TFLiteConverter:
    spec = tf.TensorSpec(shape, tf.float32, name=name)
    function = tf.function(_forward(network), input_signature=[spec], autograph=False)
    return tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])


def _forward(network: Network) -> Callable[[tf.Tensor], tf.Tensor]:
    """The network as a TensorFlow function of constants, so that nothing is left to freeze."""

    def forward(inputs: tf.Tensor) -> tf.Tensor:
        x = inputs
        if tuple(x.shape) != (1, *network.spatial):
            x = tf.reshape(x, (1, *network.spatial))
        for layer in network.layers:
            match layer:
                case Conv(kernel, bias, strides, relu):
                    x = tf.nn.bias_add(tf.nn.conv2d(x, kernel, strides, "SAME"), bias)
                    x = tf.nn.relu(x) if relu else x
                case Dense(kernel, bias, relu):
                    x = tf.nn.bias_add(tf.matmul(x, kernel), bias)
                    x = tf.nn.relu(x) if relu else x
                case MaxPool():
                    x = tf.nn.max_pool2d(x, 2, 2, "VALID")
                case GlobalMean():  # as a pool: XNNPACK rounds an int8 MEAN unlike other kernels
                    x = tf.nn.avg_pool2d(x, x.shape[1:3], 1, "VALID")
                    x = tf.reshape(x, (1, -1))
                case Flatten():
                    x = tf.reshape(x, (1, -1))
        return tf.nn.softmax(x, name=OUTPUT_NAME)

    return forward


def to_onnx(networks: Sequence[Network], name: str, shape: Sequence[int]) -> bytes:
    """float32 ONNX of the mean of the members' probabilities (one member: its own)."""
    graph = _OnnxGraph()
    members = [graph.add_network(network, name, f"member{i}") for i, network in enumerate(networks)]
    graph.add("Mean", members, output=OUTPUT_NAME)
    classes = networks[0].layers[-1].bias.size
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "classifier",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [1, classes])],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", ONNX_OPSET)],
        ir_version=ONNX_IR_VERSION,
        producer_name="edge-agent",
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


class _OnnxGraph:
    """Nodes and constants of a graph under construction; activations are channels first."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], *, output: str | None = None, **attributes: object) -> str:
        """Appends a node with one output and returns the output's name."""
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: NDArray, name: str) -> str:
        """Adds an initializer and returns its name."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add_network(self, network: Network, source: str, prefix: str) -> str:
        """Appends `network` applied to the tensor `source`; returns its probabilities [1, n]."""
        spatial = self.constant(np.array([1, *network.spatial], np.int64), f"{prefix}.spatial")
        x = self.add("Transpose", [self.add("Reshape", [source, spatial])], perm=[0, 3, 1, 2])
        flat = self.constant(np.array([1, -1], np.int64), f"{prefix}.flat")
        for i, layer in enumerate(network.layers):
            match layer:
                case Conv(kernel, bias, strides, relu):
                    w = self.constant(kernel.transpose(3, 2, 0, 1), f"{prefix}.{i}.kernel")
                    b = self.constant(bias, f"{prefix}.{i}.bias")
                    x = self.add(
                        "Conv",
                        [x, w, b],
                        kernel_shape=kernel.shape[:2],
                        strides=strides,
                        auto_pad="SAME_UPPER",
                    )
                    x = self.add("Relu", [x]) if relu else x
                case Dense(kernel, bias, relu):
                    w = self.constant(kernel, f"{prefix}.{i}.kernel")
                    b = self.constant(bias, f"{prefix}.{i}.bias")
                    x = self.add("Gemm", [x, w, b])
                    x = self.add("Relu", [x]) if relu else x
                case MaxPool():
                    x = self.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
                case GlobalMean():
                    x = self.add("Reshape", [self.add("GlobalAveragePool", [x]), flat])
                case Flatten():
                    x = self.add("Transpose", [x], perm=[0, 2, 3, 1])
                    x = self.add("Reshape", [x, flat])
        return self.add("Softmax", [x], axis=1)
