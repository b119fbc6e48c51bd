// CRC-32 of IEEE 802.3 (reflected, initial value and final xor 0xFFFFFFFF): the value of zlib's crc32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

// `crc` is the result over the bytes before, 0 at the start.
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size);

}  // namespace edge
