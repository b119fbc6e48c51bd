// What the session holds of its requests: body buffers, the queue, the message being reassembled, the answers
// given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"
#include "core/frame.h"
#include "core/limits.h"
#include "core/messages.h"

namespace edge {

// Of what changes something, a repeated request must find its answer. INFER only computes: run again, it
// answers the same.
static_assert(kStoredAnswer >= kModelStatusSize, "the answer to a model message must fit the answer store");
static_assert(kMaxMessage >= kMaxFrame, "a body that fits a frame must fit a buffer");

// One buffer per open request and one for the message being reassembled, so that a place in the window is a
// buffer.
class BodyPool {
 public:
  uint8_t* take();
  void give(const uint8_t* body);

 private:
  uint8_t bodies_[kMaxWindow + 1][kMaxMessage];
  bool taken_[kMaxWindow + 1] = {};
};

struct Request {
  uint32_t id = 0;
  uint8_t type = 0;
  uint64_t received_us = 0;  // last byte
  uint8_t* body = nullptr;   // of the pool
  size_t size = 0;
};

// First in, first out, up to `window`.
class RequestQueue {
 public:
  explicit RequestQueue(size_t window) : window_(window) {}
  bool full() const { return size_ == window_; }
  size_t size() const { return size_; }
  bool contains(uint32_t id) const;
  void push(const Request& request) { items_[size_++] = request; }
  Request pop() { return remove_at(0); }
  // Takes the request out; false if it is not queued.
  bool remove(uint32_t id, Request* out);

 private:
  Request remove_at(size_t index);

  size_t window_;
  size_t size_ = 0;
  Request items_[kMaxWindow];
};

// Answers to the last `window` completed requests, oldest dropped first.
class AnswerStore {
 public:
  explicit AnswerStore(size_t window) : window_(window) {}
  void remember(uint32_t id, uint8_t type, Span body);
  // False if the request is not remembered or its answer was too large to keep.
  bool find(uint32_t id, uint8_t* type, Span* body) const;

 private:
  struct Answer {
    uint32_t id = 0;
    uint8_t type = 0;
    size_t size = 0;
    uint8_t body[kStoredAnswer];
  };
  size_t window_;
  size_t next_ = 0;
  Answer answers_[kMaxWindow];
};

// One message at a time from its fragments.
class Reassembly {
 public:
  enum class Result : uint8_t { kMore, kComplete, kIgnored, kBadLength, kBadFragment, kTooLarge };

  // The id of a message that this piece replaces, which is owed BAD_FRAGMENT; 0 if none.
  uint32_t replaces(const FrameHeader& header) const;
  Result add(const FrameHeader& header, Span payload, BodyPool& pool);
  // After kComplete: the body, which the caller gives back to the pool.
  Span take();
  bool holds(uint32_t id) const { return body_ != nullptr && id_ == id; }
  void drop(BodyPool& pool);

 private:
  Result refuse(uint32_t id, Result why, BodyPool& pool);

  uint8_t* body_ = nullptr;  // null: no message is open
  uint32_t id_ = 0;
  uint8_t type_ = 0;
  size_t total_ = 0;
  size_t received_ = 0;
  uint32_t refused_ = 0;  // its later pieces are ignored: it was answered already
};

}  // namespace edge
