"""SCons script of the in-tree platform: the sources of the environment, as a shared library or a program.

`custom_output` in platformio.ini chooses: `library` or `program`.
"""

from SCons.Script import AlwaysBuild, Default, DefaultEnvironment

env = DefaultEnvironment()
option = env.GetProjectOption
library = option("custom_output", "library") == "library"

env.Replace(CC="cc", CXX=option("custom_cxx", "g++"), LINK="$CXX")
env.ProcessFlags(env.get("BUILD_FLAGS"))
env.ProcessUnFlags(env.get("BUILD_UNFLAGS"))
# A sanitizer is a flag of the linker too, which PlatformIO does not know.
env.Append(LINKFLAGS=[flag for flag in env.get("CCFLAGS", []) if str(flag).startswith("-fsanitize")])

sources = env.CollectBuildFiles("$BUILD_DIR/src", "$PROJECT_SRC_DIR", env.get("SRC_FILTER"))
if library:
    # SCons marks static and shared objects apart; these are plain objects, so position independence is asked for here.
    env.Append(CCFLAGS=["-fPIC", "-fvisibility=hidden"])
    objects = [env.Object(source) for source in sources]
    output = env.Command("$BUILD_DIR/libedge_mcu.so", objects, "$LINK -shared -o $TARGET $SOURCES $LINKFLAGS")
else:
    output = env.Program("$BUILD_DIR/program", sources)

AlwaysBuild(env.Alias("build", output))
Default(output)
