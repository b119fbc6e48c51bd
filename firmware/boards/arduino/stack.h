// How deep a stack went: its unused part is painted once, and looked at when somebody asks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge::port {

class PaintedStack {
 public:
  // From `bottom` up to where the stack is now. `top` is the end of the stack.
  void paint(uint32_t* bottom, uint32_t* top) {
    bottom_ = bottom;
    top_ = top;
    uint32_t* here = static_cast<uint32_t*>(__builtin_frame_address(0)) - kOwnWords;
    for (uint32_t* word = bottom; word < here; ++word) *word = kPaint;
  }

  // Bytes; 0 if it was not painted.
  uint32_t high_water() const {
    const uint32_t* word = bottom_;
    while (word < top_ && *word == kPaint) ++word;
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(top_) - reinterpret_cast<uintptr_t>(word));
  }

 private:
  static constexpr uint32_t kPaint = 0xA5A5A5A5;
  static constexpr size_t kOwnWords = 16;  // the frame that paints
  const uint32_t* bottom_ = nullptr;
  const uint32_t* top_ = nullptr;
};

}  // namespace edge::port
