#include "core/model_update.h"

#include <cstring>

#include "core/validator.h"

namespace edge {

bool ModelUpdate::has_engine() const { return &engine_ != &null_engine(); }

Status ModelUpdate::boot() {
  if (!store_.mount()) return {Code::kFlash, "no model store: flash too small or unreadable"};
  if (!has_engine()) return {};
  Status problem;
  const int active = store_.find(SlotState::kActive);
  if (active >= 0) {
    problem = load(static_cast<size_t>(active));
    if (problem.ok()) return problem;
    // Even if this write fails the slot below is tried: a model that runs is worth more than the record of
    // it.
    store_.set_state(static_cast<size_t>(active), SlotState::kBad);
  }
  const int stored = store_.find(SlotState::kStored);
  if (stored >= 0 && load(static_cast<size_t>(stored)).ok()) store_.activate(static_cast<size_t>(stored));
  return problem;
}

Status ModelUpdate::begin(Span body) {
  Manifest manifest;
  if (!manifest.parse(body)) return {Code::kBadLength, ""};
  if (!has_engine()) return {Code::kNoEngine, ""};
  if (manifest.arena > engine_.arena_size())
    return {Code::kArena, "manifest asks for more than the board has"};
  return store_.begin(manifest);
}

Status ModelUpdate::chunk(Span body) {
  ModelChunk chunk;
  if (!chunk.parse(body)) return {Code::kBadLength, ""};
  return store_.chunk(chunk);
}

Status ModelUpdate::commit(uint8_t* scratch, size_t scratch_size) {
  const int receiving = store_.find(SlotState::kReceiving);
  if (receiving < 0) return {Code::kNotBegun, ""};
  if (!store_.complete()) return {Code::kIncomplete, ""};
  const size_t index = static_cast<size_t>(receiving);
  const int before = loaded_;
  Status status = check(index, scratch, scratch_size);
  if (status.ok()) status = store_.activate(index);
  if (status.ok()) return status;
  if (status.code != Code::kFlash) store_.set_state(index, SlotState::kBad);
  if (before >= 0 && loaded_ != before) load(static_cast<size_t>(before));
  return status;
}

Status ModelUpdate::abort() {
  const int receiving = store_.find(SlotState::kReceiving);
  return receiving < 0 ? Status{} : store_.set_state(static_cast<size_t>(receiving), SlotState::kEmpty);
}

Status ModelUpdate::check(size_t index, uint8_t* scratch, size_t scratch_size) {
  if (!store_.image_digest_matches(index)) return {Code::kDigest, "image_sha256"};
  Status status = check_signature(store_.slot(index).manifest);
  if (status.ok()) status = load(index);
  if (status.ok()) status = selftest(index, scratch, scratch_size);
  return status;
}

Status ModelUpdate::check_signature(const Manifest& manifest) {
  if (verifier_ == nullptr) return {};
  if (manifest.signature_kind != kSignatureEd25519)
    return {Code::kSignature, "this board takes signed models only"};
  Manifest covered = manifest;
  covered.chunk = 0;  // the chunk size is the line's affair, not the signer's
  uint8_t message[kManifestSize];
  Writer out(message, sizeof message);
  covered.write(out);
  const bool good = verifier_->verify(message, kManifestSigned, manifest.signature);
  return good ? Status{} : Status{Code::kSignature, "wrong signature"};
}

Status ModelUpdate::load(size_t index) {
  loaded_ = -1;
  info_ = ModelInfo();
  if (!store_.model_digest_matches(index)) return {Code::kDigest, "model_sha256"};
  ModelShape shape;
  const Status valid = validate_model(store_.model(index), engine_.operators(), &shape);
  if (!valid.ok()) return valid;
  ModelInfo info;
  switch (engine_.load(store_.model(index), &info)) {
    case LoadResult::kOk:
      break;
    case LoadResult::kOperator:
      return {Code::kOperator, engine_.last_error()};
    case LoadResult::kArena:
      return {Code::kArena, engine_.last_error()};
    case LoadResult::kInvalid:
      return {Code::kInvalidModel, engine_.last_error()};
  }
  if (info.input_bytes != shape.input_bytes || info.output_bytes != shape.output_bytes) {
    return {Code::kInvalidModel, "engine and file disagree on the tensors' sizes"};
  }
  info_ = info;
  loaded_ = static_cast<int>(index);
  return {};
}

Status ModelUpdate::selftest(size_t index, uint8_t* scratch, size_t scratch_size) {
  const Span vector = store_.selftest(index);
  if (vector.size == 0) return {};
  const size_t expected_size = static_cast<size_t>(info_.input_bytes) + info_.output_bytes;
  if (vector.size != expected_size || info_.output_bytes > scratch_size) {
    return {Code::kSelftest, "length of the self-test vector"};
  }
  if (!engine_.invoke({vector.data, info_.input_bytes}, scratch, info_.output_bytes)) {
    return {Code::kSelftest, engine_.last_error()};
  }
  const uint8_t* expected = vector.data + info_.input_bytes;
  const int tolerance = store_.slot(index).manifest.selftest_tolerance;
  for (size_t i = 0; i < info_.output_bytes; ++i) {
    const int difference = static_cast<int8_t>(scratch[i]) - static_cast<int8_t>(expected[i]);
    if (difference > tolerance || -difference > tolerance) return {Code::kSelftest, "output differs"};
  }
  return {};
}

}  // namespace edge
