// What C++ wants from a system. There is no _sbrk, so that an image whose code reaches malloc does not link.
#include <cstddef>

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
