"""TensorFlow Lite Micro from the folder that $TFLM_LIB_DIR names, as a static library.

Expected there: `tensorflow/` and `signal/` as upstream has them, and the headers that they include, from
`third_party/flatbuffers/include`, `third_party/gemmlowp` and `third_party/ruy`. Only portable code is taken, so the
kernels are the reference ones. The `src/` of the library in PlatformIO's registry is such a folder too.
"""

import os
import re
from pathlib import Path

# The interpreter and what it stands on, relative to the folder.
CORE = re.compile(
    r"tensorflow/compiler/mlir/lite/(core|schema)(/\w+)*/\w+\.(cc|cpp|c)"
    r"|tensorflow/lite/((core|schema)(/\w+)*|kernels|kernels/internal(/reference)?)/\w+\.(cc|cpp|c)"
    r"|tensorflow/lite/\w+\.(cc|cpp|c)"
    r"|tensorflow/lite/micro/((arena_allocator|memory_planner|tflite_bridge)/)?\w+\.(cc|cpp|c)"
)
# The kernels of the operators that engine/tflm_engine.cpp names, and their helpers: a fifth of all there are.
KERNELS = re.compile(
    r"tensorflow/lite/micro/kernels/(activations|add|conv|depthwise_conv|dequantize|fully_connected|kernel_util|logistic"
    r"|micro_tensor_utils|pad|pooling|quantize|reduce|reshape|softmax)(_common|_int8|_int16)?\.(cc|cpp|c)"
)
NOT_PART = re.compile(r"_test\.|/test_|/mock_|/fake_|/recording_|/debug_log\.")


def library(env):
    """The library to link, or nothing where the variable is not set. Defines EDGE_TFLM."""
    named = os.environ.get("TFLM_LIB_DIR")
    if not named:
        return []
    root = Path(named).resolve()
    if not (root / "tensorflow/lite/micro/micro_interpreter.h").is_file():
        raise SystemExit(f"TFLM_LIB_DIR={named}: no tensorflow/lite/micro/micro_interpreter.h there")
    headers = [root, *(root / "third_party" / path for path in ("flatbuffers/include", "gemmlowp", "ruy"))]
    system = [part for path in headers for part in ("-isystem", str(path))]
    env.Append(CPPDEFINES=["EDGE_TFLM"], CCFLAGS=system)

    defines = ["TF_LITE_STRIP_ERROR_STRINGS", "NDEBUG"]
    # It changes the layout of structures. Upstream's sources want it, an Arduino library is built without.
    if not (root.parent / "library.properties").is_file():
        defines.append("TF_LITE_STATIC_MEMORY")
    env.Append(CPPDEFINES=defines)

    theirs = env.Clone()
    ours = ("-W", "-I")
    theirs.Replace(CCFLAGS=[flag for flag in env["CCFLAGS"] if not str(flag).startswith(ours)])
    theirs.Append(
        CCFLAGS=["-w", "-fno-exceptions"],
        CXXFLAGS=["-fno-rtti"],
    )
    objects = []
    for path in sorted(root.glob("tensorflow/**/*")):
        name = path.relative_to(root).as_posix()
        if (CORE.fullmatch(name) or KERNELS.fullmatch(name)) and not NOT_PART.search("/" + name):
            target = "$BUILD_DIR/tflm/" + name.replace("/", "_") + ".o"
            objects.append(theirs.Object(target, str(path)))
    return [env.StaticLibrary("$BUILD_DIR/tflm/tflm", objects)]
