// What C++ wants from a system. There is no _sbrk, so that an image whose code reaches malloc does not link.
#include <cstddef>
#include <cstdint>

extern "C" {

[[noreturn]] __attribute__((used)) void abort() {
  __asm volatile("udf #0");  // recorded as a fault
  for (;;) {
  }
}

void __cxa_pure_virtual() { abort(); }

// Static objects live as long as the board does.
int __aeabi_atexit(void*, void (*)(void*), void*) { return 0; }
int __cxa_atexit(void (*)(void*), void*, void*) { return 0; }

extern void* __dso_handle;
void* __dso_handle = nullptr;

}  // extern "C"

// Named by virtual destructors, never called: nothing is allocated.
void operator delete(void*) noexcept { abort(); }
void operator delete(void*, size_t) noexcept { abort(); }

// Instead of the C library's, which are unrolled: a fifth of their size. Words where both sides are aligned.
using Word __attribute__((may_alias)) = uint32_t;

extern "C" {

__attribute__((used, noinline)) void* memcpy(void* to, const void* from, size_t size) {
  uint8_t* out = static_cast<uint8_t*>(to);
  const uint8_t* in = static_cast<const uint8_t*>(from);
  if (((reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in)) & 3) == 0) {
    for (; size >= 4; size -= 4, out += 4, in += 4) {
      *reinterpret_cast<Word*>(out) = *reinterpret_cast<const Word*>(in);
    }
  }
  while (size-- > 0) *out++ = *in++;
  return to;
}

__attribute__((used, noinline)) void* memset(void* to, int value, size_t size) {
  uint8_t* out = static_cast<uint8_t*>(to);
  const uint32_t word = static_cast<uint8_t>(value) * 0x01010101u;
  if ((reinterpret_cast<uintptr_t>(out) & 3) == 0) {
    for (; size >= 4; size -= 4, out += 4) *reinterpret_cast<Word*>(out) = word;
  }
  while (size-- > 0) *out++ = static_cast<uint8_t>(value);
  return to;
}

}  // extern "C"
