#include "core/crc32.h"

#include <array>

#include "core/limits.h"

namespace edge {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;

constexpr uint32_t shifted(uint32_t value, int bits) {
  for (int bit = 0; bit < bits; ++bit) value = (value & 1) != 0 ? kPolynomial ^ (value >> 1) : value >> 1;
  return value;
}

// Table k is the CRC of a byte followed by k zero bytes: with n of them, n bytes are taken at a time.
using Table = std::array<uint32_t, 256>;
constexpr std::array<Table, kCrcTables> make_tables() {
  std::array<Table, kCrcTables> tables{};
  for (uint32_t i = 0; kCrcTables > 0 && i < 256; ++i) tables[0][i] = shifted(i, 8);
  for (size_t k = 1; k < kCrcTables; ++k) {
    for (uint32_t i = 0; i < 256; ++i) tables[k][i] = shifted(tables[k - 1][i], 8);
  }
  return tables;
}

// The same for half a byte.
constexpr std::array<uint32_t, 16> make_small_table() {
  std::array<uint32_t, 16> table{};
  for (uint32_t i = 0; i < 16; ++i) table[i] = shifted(i, 4);
  return table;
}

[[maybe_unused]] constexpr std::array<Table, kCrcTables> kTables = make_tables();
[[maybe_unused]] constexpr std::array<uint32_t, 16> kSmallTable = make_small_table();

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
  for (size_t i = 0; i < size; ++i) {
    if constexpr (kCrcTables > 0) {
      crc = kTables[0][(crc ^ data[i]) & 0xFF] ^ (crc >> 8);
    } else {
      crc ^= data[i];
      crc = kSmallTable[crc & 15] ^ (crc >> 4);
      crc = kSmallTable[crc & 15] ^ (crc >> 4);
    }
  }
  return ~crc;
}

}  // namespace edge
