// SHA-256 (FIPS 180-4), streaming.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

constexpr size_t kSha256Size = 32;

class Sha256 {
 public:
  Sha256();
  void update(const uint8_t* data, size_t size);
  // Ends the message; the object is used up.
  void finish(uint8_t digest[kSha256Size]);

 private:
  void block(const uint8_t* data);

  uint32_t state_[8];
  uint64_t length_ = 0;
  uint8_t pending_[64];
};

}  // namespace edge
