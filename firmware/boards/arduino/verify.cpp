// Ed25519 from the library rweather/Crypto.
#include "boards/arduino/verify.h"

#ifdef EDGE_PUBLIC_KEY

#include <Crypto.h>
#include <Ed25519.h>

namespace edge {
namespace {

constexpr char kHex[] = EDGE_PUBLIC_KEY;
static_assert(sizeof kHex == 2 * 32 + 1, "EDGE_PUBLIC_KEY is 64 hexadecimal digits");

constexpr int digit(char c) {
  return c >= '0' && c <= '9'   ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                : -1;
}

constexpr bool all_digits() {
  for (size_t i = 0; i + 1 < sizeof kHex; ++i) {
    if (digit(kHex[i]) < 0) return false;
  }
  return true;
}
static_assert(all_digits(), "EDGE_PUBLIC_KEY is 64 hexadecimal digits");

class Ed25519Verifier final : public Verifier {
 public:
  bool verify(const uint8_t* message, size_t size, const uint8_t signature[kSignatureSize]) override {
    uint8_t key[32];
    for (size_t i = 0; i < sizeof key; ++i) {
      key[i] = static_cast<uint8_t>(digit(kHex[2 * i]) << 4 | digit(kHex[2 * i + 1]));
    }
    return Ed25519::verify(signature, key, message, size);
  }
};

Ed25519Verifier verifier;

}  // namespace

Verifier* board_verifier() { return &verifier; }

}  // namespace edge

#else

namespace edge {
Verifier* board_verifier() { return nullptr; }
}  // namespace edge

#endif
