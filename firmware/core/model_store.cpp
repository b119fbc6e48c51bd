#include "core/model_store.h"

#include <cstring>

#include "core/crc32.h"

namespace edge {
namespace {

constexpr uint32_t kMagic = 0x324D4545;   // "EEM2"
constexpr uint32_t kMagic1 = 0x314D4545;  // "EEM1": manifests of format 1, no rollback. Read, not written
constexpr uint8_t kChunkArrived = 1;
constexpr uint8_t kBlockErased = 2;
constexpr uint8_t kBlank = 0xFF;

bool get_bit(const uint8_t* bits, size_t index) { return (bits[index / 8] >> (index % 8) & 1) != 0; }
void set_bit(uint8_t* bits, size_t index) { bits[index / 8] |= static_cast<uint8_t>(1u << (index % 8)); }
// An image fits its slot, so 32 bits do: dividing 64 costs 700 bytes of library on a Cortex-M.
uint32_t chunk_count(uint32_t image, uint32_t chunk) { return (image + chunk - 1) / chunk; }
void clear_bit(uint8_t* bits, size_t index) { bits[index / 8] &= static_cast<uint8_t>(~(1u << (index % 8))); }

// What must be equal for a transfer to go on: everything but the chunk size.
bool same_transfer(const Manifest& a, const Manifest& b) {
  uint8_t left[kManifestSize] = {};
  uint8_t right[kManifestSize] = {};
  Manifest other = b;
  other.chunk = a.chunk;
  Writer left_out(left, sizeof left);
  Writer right_out(right, sizeof right);
  a.write(left_out);
  other.write(right_out);
  return memcmp(left, right, sizeof left) == 0;
}

}  // namespace

uint32_t ModelStore::directory_offset(uint32_t block, uint32_t record) const {
  return block * flash_.erase_size + record * static_cast<uint32_t>(kDirectoryRecord);
}

size_t ModelStore::chunks() const {
  if (receiving_ < 0) return 0;
  const Manifest& manifest = slots_[receiving_].manifest;
  return chunk_count(static_cast<uint32_t>(manifest.image_length()), manifest.chunk);
}

uint32_t ModelStore::chunk_length(size_t index) const {
  const Manifest& manifest = slots_[receiving_].manifest;
  const uint64_t left = manifest.image_length() - static_cast<uint64_t>(index) * manifest.chunk;
  return left < manifest.chunk ? static_cast<uint32_t>(left) : manifest.chunk;
}

// Ties journal entries to their image: an entry that outlived an interrupted erase is never taken for
// another's.
uint32_t ModelStore::journal_tag() const {
  return Reader({slots_[receiving_].manifest.image_sha256, 4}).u32();
}

int ModelStore::find(SlotState state) const {
  for (size_t i = 0; i < kSlots; ++i) {
    if (slots_[i].state == state) return static_cast<int>(i);
  }
  return -1;
}

bool ModelStore::mount() {
  flash_ = hal_.flash_geometry();
  const uint32_t unit = flash_.erase_size;
  slot_size_ = 0;
  if (unit < kDirectoryRecord || flash_.write_size == 0 || kFlashAlign % flash_.write_size != 0) return false;
  const uint32_t journal_bytes = static_cast<uint32_t>(kJournalEntries * kJournalRecord);
  journal_at_ = 2 * unit;
  slots_at_ = journal_at_ + (journal_bytes + unit - 1) / unit * unit;
  if (flash_.size < slots_at_ + 2 * unit) return false;
  uint32_t blocks = (flash_.size - slots_at_) / unit / kSlots;
  if (blocks > kMaxSlotBlocks) blocks = kMaxSlotBlocks;
  slot_size_ = blocks * unit;
  if (!read_directory()) return false;
  receiving_ = find(SlotState::kReceiving);
  replay_journal();
  return true;
}

bool ModelStore::read_directory() {
  uint8_t raw[kDirectoryRecord];
  const uint32_t records = flash_.erase_size / kDirectoryRecord;
  sequence_ = 0;
  directory_block_ = 1;  // as if block 1 were full: the first record goes to block 0, after an erase
  directory_next_ = records;
  for (uint32_t position = 0; position < 2 * records; ++position) {
    if (!hal_.flash_read(directory_offset(position / records, position % records), raw, sizeof raw))
      return false;
    if (Reader({raw + sizeof raw - 4, 4}).u32() != crc32(0, raw, sizeof raw - 4)) continue;
    Reader in({raw, sizeof raw});
    const uint32_t magic = in.u32();
    if (magic != kMagic && magic != kMagic1) continue;
    const bool old = magic == kMagic1;
    const uint32_t sequence = in.u32();
    if (sequence <= sequence_) continue;
    for (Slot& slot : slots_) {
      slot.state = static_cast<SlotState>(in.u8());
      slot.manifest.parse(in.take(old ? kManifestSize1 : kManifestSize));
    }
    rollback_ = old ? Rollback::kNone : static_cast<Rollback>(in.u8());
    sequence_ = sequence;
    directory_block_ = position / records;
    directory_next_ = position % records + 1;
  }
  return true;
}

bool ModelStore::blank(uint32_t offset, uint32_t size) const {
  uint8_t raw[64];
  while (size > 0) {
    const uint32_t count = size < sizeof raw ? size : static_cast<uint32_t>(sizeof raw);
    if (!hal_.flash_read(offset, raw, count)) return false;
    for (uint32_t i = 0; i < count; ++i) {
      if (raw[i] != kBlank) return false;
    }
    offset += count;
    size -= count;
  }
  return true;
}

Status ModelStore::write_directory(const Slot slots[kSlots], Rollback rollback) {
  const Status failed{Code::kFlash, "directory write"};
  if (slot_size_ == 0) return failed;
  uint8_t raw[kDirectoryRecord];
  Writer out(raw, sizeof raw);
  out.u32(kMagic);
  out.u32(sequence_ + 1);
  for (size_t i = 0; i < kSlots; ++i) {
    out.u8(static_cast<uint8_t>(slots[i].state));
    slots[i].manifest.write(out);
    if (slots[i].manifest.format <= 1) out.fill(0, kManifestSize - kManifestSize1);
  }
  out.u8(static_cast<uint8_t>(rollback));
  out.fill(kBlank, sizeof raw - 4 - out.size());
  out.u32(crc32(0, raw, sizeof raw - 4));

  // A record that was cut short leaves its place unusable until the erase.
  const uint32_t records = flash_.erase_size / kDirectoryRecord;
  uint32_t block = directory_block_;
  uint32_t record = directory_next_;
  while (record < records && !blank(directory_offset(block, record), kDirectoryRecord)) ++record;
  if (record == records) {
    block = 1 - directory_block_;
    record = 0;
    if (!erase(directory_offset(block, 0))) return failed;
  }
  if (!write(directory_offset(block, record), raw, sizeof raw)) return failed;

  ++sequence_;
  directory_block_ = block;
  directory_next_ = record + 1;
  for (size_t i = 0; i < kSlots; ++i) slots_[i] = slots[i];
  rollback_ = rollback;
  receiving_ = find(SlotState::kReceiving);
  return {};
}

void ModelStore::replay_journal() {
  received_ = 0;
  journal_next_ = 0;
  memset(chunk_bits_, 0, sizeof chunk_bits_);
  memset(block_bits_, 0, sizeof block_bits_);
  if (receiving_ < 0) return;
  const uint32_t tag = journal_tag();
  for (uint32_t i = 0; i < kJournalEntries; ++i) {
    uint8_t raw[kJournalRecord];
    if (!hal_.flash_read(journal_at_ + i * kJournalRecord, raw, sizeof raw)) return;
    Reader in({raw, sizeof raw});
    const uint32_t word = in.u32();
    const uint32_t check = in.u32();
    if (word == 0xFFFFFFFF && check == 0xFFFFFFFF) continue;
    journal_next_ = i + 1;
    if (check != ~(word ^ tag)) continue;
    const uint32_t index = word & 0xFFFFFF;
    if (word >> 24 == kBlockErased && index < slot_size_ / flash_.erase_size) {
      apply_erase(index);
    } else if (word >> 24 == kChunkArrived && index < chunks() && !get_bit(chunk_bits_, index)) {
      set_bit(chunk_bits_, index);
      ++received_;
    }
  }
}

bool ModelStore::append_journal(uint8_t kind, uint32_t index) {
  if (journal_next_ >= kJournalEntries) return false;
  uint8_t raw[kJournalRecord];
  Writer out(raw, sizeof raw);
  const uint32_t word = static_cast<uint32_t>(kind) << 24 | index;
  out.u32(word);
  out.u32(~(word ^ journal_tag()));
  out.fill(kBlank, sizeof raw - out.size());
  const uint32_t offset = journal_at_ + journal_next_++ * static_cast<uint32_t>(kJournalRecord);
  return write(offset, raw, sizeof raw);
}

// Every chunk that lies in the block, even in part, is gone.
void ModelStore::apply_erase(uint32_t block) {
  set_bit(block_bits_, block);
  const uint32_t from = block * flash_.erase_size;
  const uint32_t to = from + flash_.erase_size;
  const uint32_t chunk = slots_[receiving_].manifest.chunk;
  for (size_t index = from / chunk; index < chunks() && index * chunk < to; ++index) {
    if (!get_bit(chunk_bits_, index)) continue;
    clear_bit(chunk_bits_, index);
    --received_;
  }
}

// The entry is written first: after a cut between the two the block counts as erased but is not, which the
// next write notices; the other way round chunks would count as received that are gone.
bool ModelStore::erase_slot_block(uint32_t block) {
  if (!append_journal(kBlockErased, block)) return false;
  apply_erase(block);
  return erase(slot_offset(static_cast<size_t>(receiving_)) + block * flash_.erase_size);
}

size_t ModelStore::free_slot() const {
  if (receiving_ >= 0) return static_cast<size_t>(receiving_);
  const bool first_in_use = slots_[0].state == SlotState::kActive;
  const bool first_is_spare = slots_[0].state == SlotState::kStored && find(SlotState::kActive) < 0;
  return first_in_use || first_is_spare ? 1 : 0;
}

Status ModelStore::begin(const Manifest& manifest) {
  if (slot_size_ == 0) return {Code::kFlash, "no room for a model store"};
  if (manifest.format != 1 && manifest.format != 2) return {Code::kInvalidModel, "unknown image format"};
  if (manifest.model_length == 0) return {Code::kInvalidModel, "empty model"};
  if (manifest.image_length() > slot_size_) return {Code::kTooLarge, "image over slot_size"};
  const uint32_t image = static_cast<uint32_t>(manifest.image_length());
  if (manifest.chunk == 0 || manifest.chunk > kMaxFrame - kFrameOverhead - kChunkHead) {
    return {Code::kBadLength, "chunk size"};
  }
  if (manifest.chunk < image && manifest.chunk % kFlashAlign != 0) {
    return {Code::kBadLength, "chunk must be a multiple of 16"};
  }
  if (chunk_count(image, manifest.chunk) > kMaxChunks) return {Code::kBadLength, "chunk too small"};

  // Both slots are needed: for the model in trial and for the one to go back to.
  if (find(SlotState::kTrial) >= 0) return {Code::kInTrial, "confirm the model in trial or roll it back"};
  const int active = find(SlotState::kActive);
  if (active >= 0 && (manifest.flags & kAllowDowngrade) == 0) {
    const Manifest& current = slots_[active].manifest;
    const bool same = memcmp(current.model_sha256, manifest.model_sha256, kSha256Size) == 0;
    if (manifest.counter < current.counter || (manifest.counter == current.counter && !same)) {
      return {Code::kDowngrade, "counter is not above the active model's"};
    }
  }
  // A full journal takes no chunk any more: then the same image begins anew.
  const bool resumes = receiving_ >= 0 && journal_next_ < kJournalEntries;
  if (resumes && same_transfer(slots_[receiving_].manifest, manifest)) return {};

  // Journal first: a cut before the record leaves the old transfer without entries, which only costs its
  // chunks.
  const size_t target = free_slot();
  const uint32_t journal_end = slots_at_;
  for (uint32_t at = journal_at_; at < journal_end; at += flash_.erase_size) {
    if (!blank(at, flash_.erase_size) && !erase(at)) return {Code::kFlash, "journal erase"};
  }
  Slot slots[kSlots] = {slots_[0], slots_[1]};
  slots[target] = {SlotState::kReceiving, manifest};
  const Status status = write_directory(slots, rollback_);
  if (status.ok()) replay_journal();
  return status;
}

bool ModelStore::write_segment(uint32_t offset, const uint8_t* data, uint32_t size) {
  uint8_t tail[kFlashAlign];
  const uint32_t whole = size / kFlashAlign * kFlashAlign;
  if (whole > 0 && !write(offset, data, whole)) return false;
  if (whole == size) return true;
  memset(tail, kBlank, sizeof tail);
  memcpy(tail, data + whole, size - whole);
  return write(offset + whole, tail, sizeof tail);
}

Status ModelStore::chunk(const ModelChunk& chunk) {
  if (receiving_ < 0) return {Code::kNotBegun, ""};
  const Manifest& manifest = slots_[receiving_].manifest;
  if (chunk.offset % manifest.chunk != 0 || chunk.offset >= manifest.image_length()) {
    return {Code::kBadOffset, "outside the image or off the grid"};
  }
  const uint32_t index = chunk.offset / manifest.chunk;
  if (chunk.data.size != chunk_length(index)) return {Code::kBadOffset, "length of the chunk"};
  if (get_bit(chunk_bits_, index)) return {};

  const uint32_t base = slot_offset(static_cast<size_t>(receiving_));
  const uint32_t end = chunk.offset + static_cast<uint32_t>(chunk.data.size);
  for (uint32_t at = chunk.offset; at < end;) {
    const uint32_t block = at / flash_.erase_size;
    const uint32_t block_end = (block + 1) * flash_.erase_size;
    const uint32_t size = (end < block_end ? end : block_end) - at;
    const uint8_t* data = chunk.data.data + (at - chunk.offset);
    if (!get_bit(block_bits_, block) && !erase_slot_block(block)) return {Code::kFlash, "erase"};
    if (memcmp(hal_.flash_map(base + at), data, size) != 0) {
      // Not blank: an earlier write was cut short. Its block starts over.
      if (!blank(base + at, size) && !erase_slot_block(block)) return {Code::kFlash, "erase"};
      if (!write_segment(base + at, data, size)) return {Code::kFlash, "write"};
    }
    at += size;
  }
  if (!append_journal(kChunkArrived, index)) return {Code::kFlash, "journal"};
  set_bit(chunk_bits_, index);
  ++received_;
  return {};
}

Span ModelStore::model(size_t index) const {
  return {hal_.flash_map(slot_offset(index)), slots_[index].manifest.model_length};
}

Span ModelStore::selftest(size_t index) const {
  const Manifest& manifest = slots_[index].manifest;
  return {hal_.flash_map(slot_offset(index)) + manifest.model_length, manifest.selftest_length};
}

bool ModelStore::sha256_is(Span bytes, const uint8_t expected[kSha256Size]) const {
  if (bytes.size > slot_size_) return false;
  uint8_t digest[kSha256Size];
  Sha256 sha;
  for (size_t at = 0; at < bytes.size; at += kHashStep) {
    const size_t left = bytes.size - at;
    sha.update(bytes.data + at, left < kHashStep ? left : kHashStep);
    hal_.watchdog_kick();
  }
  sha.finish(digest);
  return memcmp(digest, expected, sizeof digest) == 0;
}

bool ModelStore::model_digest_matches(size_t index) const {
  return sha256_is(model(index), slots_[index].manifest.model_sha256);
}

bool ModelStore::image_digest_matches(size_t index) const {
  const Manifest& manifest = slots_[index].manifest;
  return sha256_is({model(index).data, static_cast<size_t>(manifest.image_length())}, manifest.image_sha256);
}

Status ModelStore::activate(size_t index, SlotState as) {
  Slot slots[kSlots] = {slots_[0], slots_[1]};
  for (Slot& slot : slots) {
    if (slot.state == SlotState::kActive) slot.state = SlotState::kStored;
  }
  slots[index].state = as;
  return write_directory(slots, Rollback::kNone);
}

Status ModelStore::roll_back(bool former, Rollback why) {
  Slot slots[kSlots] = {slots_[0], slots_[1]};
  for (Slot& slot : slots) {
    if (slot.state == SlotState::kTrial) slot.state = SlotState::kBad;
    if (former && slot.state == SlotState::kStored) slot.state = SlotState::kActive;
  }
  return write_directory(slots, why);
}

Status ModelStore::set_state(size_t index, SlotState state) {
  Slot slots[kSlots] = {slots_[0], slots_[1]};
  slots[index].state = state;
  return write_directory(slots, rollback_);
}

ModelStatus ModelStore::status() const {
  return receiving_ < 0 ? ModelStatus() : status_of(static_cast<size_t>(receiving_));
}

ModelStatus ModelStore::status_of(size_t index) const {
  const Slot& slot = slots_[index];
  ModelStatus out;
  out.slot = static_cast<uint8_t>(index);
  out.state = slot.state;
  out.chunk = slot.manifest.chunk;
  out.length = static_cast<uint32_t>(slot.manifest.image_length());
  memcpy(out.image_sha256, slot.manifest.image_sha256, kSha256Size);
  out.received = out.next = out.length;
  if (slot.state != SlotState::kReceiving) return out;

  out.received = 0;
  size_t next = chunks();
  for (size_t i = chunks(); i-- > 0;) {
    if (get_bit(chunk_bits_, i)) {
      out.received += chunk_length(i);
    } else {
      next = i;
    }
  }
  if (next < chunks()) out.next = static_cast<uint32_t>(next * slot.manifest.chunk);
  for (size_t k = 0; k < kStatusBitmap * 8 && next + k < chunks(); ++k) {
    if (get_bit(chunk_bits_, next + k)) set_bit(out.bitmap, k);
  }
  return out;
}

bool ModelStore::write(uint32_t offset, const void* data, size_t size) {
  ++operations_;
  hal_.watchdog_kick();
  return hal_.flash_write(offset, data, size) && memcmp(hal_.flash_map(offset), data, size) == 0;
}

bool ModelStore::erase(uint32_t offset) {
  ++operations_;
  hal_.watchdog_kick();
  return hal_.flash_erase(offset);
}

}  // namespace edge
