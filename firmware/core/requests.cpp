#include "core/requests.h"

#include <cstring>

namespace edge {

uint8_t* BodyPool::take() {
  for (size_t i = 0; i <= kMaxWindow; ++i) {
    if (taken_[i]) continue;
    taken_[i] = true;
    return bodies_[i];
  }
  return nullptr;
}

void BodyPool::give(const uint8_t* body) {
  for (size_t i = 0; i <= kMaxWindow; ++i) {
    if (bodies_[i] == body) taken_[i] = false;
  }
}

bool RequestQueue::contains(uint32_t id) const {
  for (size_t i = 0; i < size_; ++i) {
    if (items_[i].id == id) return true;
  }
  return false;
}

bool RequestQueue::remove(uint32_t id, Request* out) {
  for (size_t i = 0; i < size_; ++i) {
    if (items_[i].id != id) continue;
    *out = remove_at(i);
    return true;
  }
  return false;
}

Request RequestQueue::remove_at(size_t index) {
  const Request request = items_[index];
  for (size_t i = index + 1; i < size_; ++i) items_[i - 1] = items_[i];
  --size_;
  return request;
}

void AnswerStore::remember(uint32_t id, uint8_t type, Span body) {
  if (id == 0) return;
  Answer& answer = answers_[next_];
  next_ = (next_ + 1) % window_;
  const bool fits = body.size <= sizeof answer.body;
  answer.id = fits ? id : 0;
  answer.type = type;
  answer.size = fits ? body.size : 0;
  if (answer.size > 0) memcpy(answer.body, body.data, answer.size);
}

bool AnswerStore::find(uint32_t id, uint8_t* type, Span* body) const {
  for (size_t i = 0; id != 0 && i < window_; ++i) {
    if (answers_[i].id != id) continue;
    *type = answers_[i].type;
    *body = {answers_[i].body, answers_[i].size};
    return true;
  }
  return false;
}

uint32_t Reassembly::replaces(const FrameHeader& header) const {
  return body_ != nullptr && id_ != header.id ? id_ : 0;
}

Reassembly::Result Reassembly::add(const FrameHeader& header, Span payload, BodyPool& pool) {
  Fragment piece;
  if (!piece.parse(payload)) return refuse(header.id, Result::kBadLength, pool);
  if (piece.offset == 0) {
    drop(pool);
    if (piece.total > kMaxMessage) return refuse(header.id, Result::kTooLarge, pool);
    body_ = pool.take();
    id_ = header.id;
    type_ = header.type;
    total_ = piece.total;
    received_ = 0;
    refused_ = 0;
  } else if (!holds(header.id)) {
    drop(pool);
    if (refused_ == header.id && header.id != 0) return Result::kIgnored;
    return refuse(header.id, Result::kBadFragment, pool);
  }
  const bool continues = piece.offset == received_ && piece.total == total_ && header.type == type_;
  if (!continues || piece.data.size > total_ - received_)
    return refuse(header.id, Result::kBadFragment, pool);
  if (piece.data.size > 0) memcpy(body_ + received_, piece.data.data, piece.data.size);
  received_ += piece.data.size;
  return received_ == total_ ? Result::kComplete : Result::kMore;
}

Span Reassembly::take() {
  const Span body{body_, total_};
  body_ = nullptr;
  return body;
}

void Reassembly::drop(BodyPool& pool) {
  if (body_ != nullptr) pool.give(body_);
  body_ = nullptr;
}

Reassembly::Result Reassembly::refuse(uint32_t id, Result why, BodyPool& pool) {
  drop(pool);
  refused_ = id;
  return why;
}

}  // namespace edge
