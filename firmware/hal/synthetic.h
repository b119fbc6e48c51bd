// A source for boards without a sensor: a pattern that moves from sample to sample. Synthetic: it stands for
// data whose answers nobody knows, and shows that sampling, inference and the line work.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

class SyntheticSource {
 public:
  void sample(uint8_t* out, size_t size) {
    for (size_t i = 0; i < size; ++i) out[i] = static_cast<uint8_t>(i * 11 + count_ * 37);
    ++count_;
  }

 private:
  uint32_t count_ = 0;
};

}  // namespace edge
