// From bytes in a slot to the model that runs: checks, self-test, activation, and what is loaded at boot.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/messages.h"
#include "core/model_store.h"
#include "engine/engine.h"
#include "hal/hal.h"
#include "hal/verify.h"

namespace edge {

class ModelUpdate {
 public:
  // `verifier` may be null: then signatures are not checked, and HELLO says so.
  ModelUpdate(Hal& hal, Engine& engine, Verifier* verifier)
      : engine_(engine), verifier_(verifier), store_(hal) {}

  // Loads the active model; if it is damaged, marks it bad and goes back to the stored one. What went wrong,
  // if anything did.
  Status boot();

  Status begin(Span body);
  Status chunk(Span body);
  // `scratch` takes the self-test's output. On failure the model that was active goes on.
  Status commit(uint8_t* scratch, size_t scratch_size);
  Status abort();

  bool has_engine() const;
  bool verifies() const { return verifier_ != nullptr; }
  int loaded() const { return loaded_; }  // slot, -1: no model
  const ModelInfo& info() const { return info_; }
  const ModelStore& store() const { return store_; }

 private:
  Status check(size_t index, uint8_t* scratch, size_t scratch_size);
  Status check_signature(const Manifest& manifest);
  Status load(size_t index);
  Status selftest(size_t index, uint8_t* scratch, size_t scratch_size);

  Engine& engine_;
  Verifier* verifier_;
  ModelStore store_;
  int loaded_ = -1;
  ModelInfo info_;
};

}  // namespace edge
