// The seam to the inference engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"

namespace edge {

enum class LoadResult : uint8_t { kOk = 0, kInvalid = 1, kOperator = 2, kArena = 3 };

struct ModelInfo {
  uint32_t input_bytes = 0;
  uint32_t output_bytes = 0;
  uint32_t arena_used = 0;
};

class Engine {
 public:
  virtual const char* name() = 0;        // name and version, "none" if there is no engine
  virtual Span operators() = 0;          // builtin operator codes that it has
  virtual uint32_t arena_size() = 0;     // bytes of tensor arena
  virtual const char* last_error() = 0;  // of the last load or invoke that failed

  // Takes the place of the model loaded before, also when it fails. The bytes stay where they are while it is
  // loaded.
  virtual LoadResult load(Span model, ModelInfo* info) = 0;
  virtual bool invoke(Span inputs, uint8_t* outputs, size_t output_size) = 0;

 protected:
  ~Engine() = default;
};

// A board without an engine: answers everything but inference.
Engine& null_engine();

// TensorFlow Lite Micro; only where the build has the library (EDGE_TFLM).
Engine& tflm_engine();

}  // namespace edge
