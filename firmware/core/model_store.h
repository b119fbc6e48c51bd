// Two model slots in flash that survive a power cut at any flash operation.
//
// Layout, in erase blocks from offset 0:
//   2 blocks   directory: append-only records, each with both slots' state and manifest. The valid record
//   with the
//              highest sequence is what counts, so a change of any state is one write.
//   n blocks   journal of the transfer that is under way: which chunk arrived, which block was erased.
//   the rest   slot 0, slot 1: the image, from the slot's first byte.
//
// A block of a slot is erased when the first chunk of a transfer touches it, so that beginning a transfer is
// quick and the image that was there survives until then.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "core/messages.h"
#include "hal/hal.h"

namespace edge {

struct Slot {
  SlotState state = SlotState::kEmpty;
  Manifest manifest;
};

class ModelStore {
 public:
  explicit ModelStore(Hal& hal) : hal_(hal) {}

  // Reads directory and journal. False if the flash is too small to hold a store: then every write fails.
  bool mount();

  const Slot& slot(size_t index) const { return slots_[index]; }
  uint32_t slot_size() const { return slot_size_; }
  int find(SlotState state) const;  // index, -1 if no slot is in it

  // Resumes a transfer of the same image, or starts anew in the slot that is not active.
  Status begin(const Manifest& manifest);
  Status chunk(const ModelChunk& chunk);
  bool complete() const { return received_ == chunks(); }

  // Compares a slot's content with its manifest.
  bool model_digest_matches(size_t index) const;
  bool image_digest_matches(size_t index) const;
  Span model(size_t index) const;
  Span selftest(size_t index) const;

  // Makes the slot `as` (active or trial) and the one that was active `stored`, in one write.
  Status activate(size_t index, SlotState as);
  // Makes the slot in trial bad and, with `former`, the stored one active, in one write that keeps `why`.
  Status roll_back(bool former, Rollback why);
  Status set_state(size_t index, SlotState state);
  // Of the last trial that was rolled back; none again when another update is taken.
  Rollback rollback() const { return rollback_; }

  // Of the receiving slot, if there is one.
  ModelStatus status() const;
  ModelStatus status_of(size_t index) const;
  uint64_t operations() const { return operations_; }

 private:
  static constexpr size_t kJournalRecord = kFlashAlign;  // so that no write unit holds two entries

  uint32_t directory_offset(uint32_t block, uint32_t record) const;
  uint32_t slot_offset(size_t index) const { return slots_at_ + static_cast<uint32_t>(index) * slot_size_; }
  size_t free_slot() const;
  bool sha256_is(Span bytes, const uint8_t expected[kSha256Size]) const;
  size_t chunks() const;
  uint32_t chunk_length(size_t index) const;
  uint32_t journal_tag() const;

  bool read_directory();
  Status write_directory(const Slot slots[kSlots], Rollback rollback);
  bool blank(uint32_t offset, uint32_t size) const;
  void replay_journal();
  bool append_journal(uint8_t kind, uint32_t index);
  void apply_erase(uint32_t block);
  bool erase_slot_block(uint32_t block);
  bool write_segment(uint32_t offset, const uint8_t* data, uint32_t size);
  bool write(uint32_t offset, const void* data, size_t size);
  bool erase(uint32_t offset);

  Hal& hal_;
  FlashGeometry flash_{};
  uint32_t journal_at_ = 0;
  uint32_t slots_at_ = 0;
  uint32_t slot_size_ = 0;

  Slot slots_[kSlots];
  Rollback rollback_ = Rollback::kNone;
  uint32_t sequence_ = 0;         // of the newest directory record, 0: none
  uint32_t directory_block_ = 0;  // where it is
  uint32_t directory_next_ = 0;   // first record behind it that may be free

  int receiving_ = -1;
  uint32_t journal_next_ = 0;
  size_t received_ = 0;
  uint8_t chunk_bits_[kMaxChunks / 8] = {};
  uint8_t block_bits_[kMaxSlotBlocks / 8] = {};  // erased in this transfer
  uint64_t operations_ = 0;
};

}  // namespace edge
