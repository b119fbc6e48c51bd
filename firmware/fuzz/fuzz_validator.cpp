// Any file into the model validator. What it accepts must have sizes that a slot could hold.
#include <cstdlib>
#include <cstring>

#include "core/limits.h"
#include "core/validator.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint8_t* file = static_cast<uint8_t*>(malloc(size + 16));
  uint8_t* model = file + 16;  // malloc aligns to 16, as flash does
  if (size > 0) memcpy(model, data, size);
  uint8_t operators[128];
  const size_t count = edge::known_operators(operators, sizeof operators);
  edge::ModelShape shape;
  const edge::Status status = edge::validate_model({model, size}, {operators, count}, &shape);
  if (!status.ok() && (status.text == nullptr || strlen(status.text) > edge::kMaxText)) abort();
  free(file);
  return 0;
}
