#include "core/crc32.h"

#include <array>

#include "core/limits.h"

namespace edge {
namespace {

using Table = std::array<uint32_t, 256>;

// Table k is the CRC of a byte followed by k zero bytes: with n of them, n bytes are taken at a time.
constexpr std::array<Table, kCrcTables> make_tables() {
  std::array<Table, kCrcTables> tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value & 1) != 0 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
    tables[0][i] = value;
  }
  for (size_t k = 1; k < kCrcTables; ++k) {
    for (uint32_t i = 0; i < 256; ++i) {
      const uint32_t before = tables[k - 1][i];
      tables[k][i] = tables[0][before & 0xFF] ^ (before >> 8);
    }
  }
  return tables;
}

constexpr std::array<Table, kCrcTables> kTables = make_tables();

}  // namespace

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size) {
  crc = ~crc;
  if constexpr (kCrcTables >= 4) {
    for (; size >= kCrcTables; size -= kCrcTables, data += kCrcTables) {
      uint32_t next = 0;
      for (size_t i = 0; i < kCrcTables; ++i) {
        const uint32_t mixed = i < 4 ? (crc >> (8 * i) & 0xFF) ^ data[i] : data[i];
        next ^= kTables[kCrcTables - 1 - i][mixed];
      }
      crc = next;
    }
  }
  for (size_t i = 0; i < size; ++i) crc = kTables[0][(crc ^ data[i]) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

}  // namespace edge
