"""SCons script of the in-tree platform: the sources of the environment, as a shared library or a program.

`custom_output` in platformio.ini chooses: `library`, `program` or `image`, a program for a board (`custom_prefix` names
the compiler, `custom_linker_script` the memory), which `-t size` measures and `-t exec` starts.
"""

import sys
from pathlib import Path

from SCons.Script import AlwaysBuild, Default, DefaultEnvironment

env = DefaultEnvironment()
project = Path(env.subst("$PROJECT_DIR"))
sys.path.insert(0, str(project / "platform" / "builder"))

option = env.GetProjectOption
kind = option("custom_output", "library")
prefix = option("custom_prefix", "")

env.Replace(CC=prefix + "gcc" if prefix else "cc", CXX=option("custom_cxx", prefix + "g++"), LINK="$CXX")
if prefix:
    env.Replace(AS=prefix + "as", AR=prefix + "ar", RANLIB=prefix + "ranlib", OBJCOPY=prefix + "objcopy")
env.ProcessFlags(env.get("BUILD_FLAGS"))
env.ProcessUnFlags(env.get("BUILD_UNFLAGS"))
# A sanitizer, a core, an FPU and what optimises are flags of the linker too, which PlatformIO does not know.
also_linked = ("-f", "-m", "-O", "-nostartfiles", "--specs", "--coverage")
env.Append(LINKFLAGS=[flag for flag in env.get("CCFLAGS", []) if str(flag).startswith(also_linked)])

library = []
if option("custom_tflm", "no") == "yes":
    import tflm

    library = tflm.library(env)

env.ProcessFlags(env.get("SRC_BUILD_FLAGS"))
sources = env.CollectBuildFiles("$BUILD_DIR/src", "$PROJECT_SRC_DIR", env.get("SRC_FILTER"))
if kind == "library":
    # SCons marks static and shared objects apart; these are plain objects, so position independence is asked for here.
    env.Append(CCFLAGS=["-fPIC", "-fvisibility=hidden"])
    objects = [env.Object(source) for source in sources]
    output = env.Command("$BUILD_DIR/libedge_mcu.so", objects, "$LINK -shared -o $TARGET $SOURCES $LINKFLAGS")
elif kind == "image":
    import image

    # Optimised as a whole, but for the engine: what the library takes is told by its objects (image.py). Unbridled,
    # that would put the locals of a whole call chain on the stack at once. The others each save a hundred bytes or two.
    flags = ["-flto", "-fconserve-stack", "-fno-tree-loop-distribute-patterns", "-fno-partial-inlining"]
    whole = env.Clone()
    whole.Append(CCFLAGS=flags)
    env.Append(LINKFLAGS=[*flags, "-flto-partition=one"])
    sources = [(env if "/engine/" in str(source) else whole).Object(source) for source in sources]
    env.Append(
        LINKFLAGS=[
            "-T",
            str(project / option("custom_linker_script")),
            f"-Wl,-Map={env.subst('$BUILD_DIR')}/firmware.map",
        ]
    )
    output = env.Program("$BUILD_DIR/firmware.elf", sources, LIBS=[*library, "m"])
    env.Depends(output, str(project / option("custom_linker_script")))
    image.targets(env, output, project / option("custom_run"))
else:
    output = env.Program("$BUILD_DIR/program", sources)

AlwaysBuild(env.Alias("build", output))
Default(output)
