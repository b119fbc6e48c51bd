// Checks a TensorFlow Lite model before the engine sees it: engines index by what the file says, unchecked.
//
// Checked: that every table and vector lies in the file; the schema version; one subgraph; every operator is
// allowed, built in and has as many inputs and outputs as its kernel reads; every tensor, buffer and operator
// index is in range; sizes of tensors without overflow, and equal to their buffer's; quantization parameters
// agree with the shape; every operator reads only what was made before it. Not checked: that the shapes of an
// operator's tensors go together (the engine's own preparation does that, and the host loads an unknown model
// in a process that may die).
#pragma once

#include "core/bytes.h"
#include "core/messages.h"

namespace edge {

struct ModelShape {
  uint32_t input_bytes = 0;
  uint32_t output_bytes = 0;
};

// `operators`: the builtin codes that the engine has. Uses no memory but the stack, under 1 KB.
// Code kInvalidModel or kOperator; the text says which check failed.
Status validate_model(Span model, Span operators, ModelShape* shape);

// The codes that this validator has rules for; an engine's list is cut to them. Returns how many.
size_t known_operators(uint8_t* out, size_t capacity);

}  // namespace edge
