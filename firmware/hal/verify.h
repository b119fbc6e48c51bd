// The seam to an Ed25519 implementation. None is written here: a board brings a reviewed one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

constexpr size_t kSignatureSize = 64;

class Verifier {
 public:
  virtual bool verify(const uint8_t* message, size_t size, const uint8_t signature[kSignatureSize]) = 0;

 protected:
  ~Verifier() = default;
};

}  // namespace edge
