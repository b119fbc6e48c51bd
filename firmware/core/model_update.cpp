#include "core/model_update.h"

#include <cstring>

#include "core/validator.h"

namespace edge {
namespace {

constexpr uint64_t kTrialUs = uint64_t{kTrialSeconds} * 1'000'000;

}  // namespace

bool ModelUpdate::has_engine() const { return &engine_ != &null_engine(); }

Status ModelUpdate::boot() {
  if (!store_.mount()) return {Code::kFlash, "no model store: flash too small or unreadable"};
  if (!has_engine()) return {};
  if (store_.find(SlotState::kTrial) >= 0) {
    const ResetCause cause = hal_.reset_cause();
    const bool crash = cause == ResetCause::kWatchdog || cause == ResetCause::kFault;
    roll_back(crash ? Rollback::kCrash : Rollback::kReset, crash);
    return store_.find(SlotState::kTrial) >= 0 ? Status{} : Status{Code::kInternal, kRolledBack};
  }
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
  if (stored >= 0 && load(static_cast<size_t>(stored)).ok()) {
    store_.activate(static_cast<size_t>(stored), SlotState::kActive);
  }
  return problem;
}

Status ModelUpdate::begin(Span body) {
  Manifest manifest;
  if (!manifest.parse(body)) return {Code::kBadLength, ""};
  if (!has_engine()) return {Code::kNoEngine, ""};
  if (manifest.arena > engine_.arena_size())
    return {Code::kArena, "manifest asks for more than the board has"};
  Status status = fits(manifest);
  // Here, so that a forged manifest costs no slot; and again at the end, when it was read back from flash.
  if (status.ok()) status = check_signature(manifest);
  return status.ok() ? store_.begin(manifest) : status;
}

Status ModelUpdate::fits(const Manifest& manifest) {
  const char* board = hal_.board_name();
  const size_t length = strnlen(board, kBoardClass);
  const bool same =
      memcmp(manifest.board, board, length) == 0 && (length == kBoardClass || manifest.board[length] == '\0');
  if (manifest.board[0] != '\0' && !same) {
    return {Code::kBoard, hal_.board_name()};
  }
  uint8_t lacks[kOperatorBits];
  memcpy(lacks, manifest.operators, sizeof lacks);
  const Span has = engine_.operators();
  for (size_t i = 0; i < has.size; ++i) {
    if (has.data[i] < 8 * kOperatorBits)
      lacks[has.data[i] / 8] &= static_cast<uint8_t>(~(1u << has.data[i] % 8));
  }
  for (const uint8_t bits : lacks) {
    if (bits != 0) return {Code::kOperator, "manifest names one that the engine lacks"};
  }
  return {};
}

Status ModelUpdate::chunk(Span body) {
  ModelChunk chunk;
  if (!chunk.parse(body)) return {Code::kBadLength, ""};
  return store_.chunk(chunk);
}

Status ModelUpdate::commit(uint8_t* scratch, size_t scratch_size, bool trial) {
  const int receiving = store_.find(SlotState::kReceiving);
  if (receiving < 0) return {Code::kNotBegun, ""};
  if (!store_.complete()) return {Code::kIncomplete, ""};
  const size_t index = static_cast<size_t>(receiving);
  const int before = loaded_;
  Status status = check(index, scratch, scratch_size);
  if (status.ok()) status = store_.activate(index, trial ? SlotState::kTrial : SlotState::kActive);
  trial_since_us_ = hal_.clock_us();
  failed_ = false;
  if (status.ok()) return status;
  if (status.code != Code::kFlash) store_.set_state(index, SlotState::kBad);
  if (loaded_ != before) {
    loaded_ = -1;
    info_ = ModelInfo();
    if (before >= 0) load(static_cast<size_t>(before));
  }
  return status;
}

Status ModelUpdate::abort() {
  const int receiving = store_.find(SlotState::kReceiving);
  return receiving < 0 ? Status{} : store_.set_state(static_cast<size_t>(receiving), SlotState::kEmpty);
}

Status ModelUpdate::end_trial(Span body, bool keep) {
  const uint8_t* tag = Reader(body).take(kModelTag).data;
  if (tag == nullptr) return {Code::kBadLength, ""};
  Status status{Code::kModelMismatch, "not in trial"};
  for (size_t i = 0; i < kSlots; ++i) {
    const Slot& slot = store_.slot(i);
    if (memcmp(slot.manifest.model_sha256, tag, kModelTag) != 0) continue;
    if (slot.state == SlotState::kTrial) {
      if (keep) return store_.set_state(i, SlotState::kActive);
      return roll_back(Rollback::kRequested, true);
    }
    if (slot.state == (keep ? SlotState::kActive : SlotState::kBad)) status = {};
  }
  return status;
}

// Back to the former model. Where there is none that loads, the one in trial stays unless it is to be
// discarded. What runs is changed in any case; the status is that of writing it down.
Status ModelUpdate::roll_back(Rollback why, bool discard) {
  Status written;
  const int former = store_.find(SlotState::kStored);
  if (former >= 0 && load(static_cast<size_t>(former)).ok()) {
    written = store_.roll_back(true, why);
  } else if (discard || !load(static_cast<size_t>(store_.find(SlotState::kTrial))).ok()) {
    loaded_ = -1;
    info_ = ModelInfo();
    written = store_.roll_back(false, why);
  }
  trial_since_us_ =
      hal_.clock_us();  // if it goes on, because there is no other or the flash fails: not at once
  return written;
}

uint64_t ModelUpdate::trial_left_us() const {
  if (store_.find(SlotState::kTrial) < 0 || store_.find(SlotState::kStored) < 0) return 0;
  const uint64_t passed = hal_.clock_us() - trial_since_us_;
  return passed < kTrialUs ? kTrialUs - passed : 0;
}

bool ModelUpdate::settle() {
  const bool failed = failed_;
  failed_ = false;
  if (store_.find(SlotState::kTrial) < 0) return false;
  const bool overdue = store_.find(SlotState::kStored) >= 0 && trial_left_us() == 0;
  if (!failed && !overdue) return false;
  const int before = loaded_;
  roll_back(failed ? Rollback::kInvoke : Rollback::kTimeout, failed);
  return loaded_ != before;
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
  const bool good = verifier_->verify(message, manifest.signed_size(), manifest.signature);
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
