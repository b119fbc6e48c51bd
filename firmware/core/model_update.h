// From bytes in a slot to the model that runs: checks, self-test, trial, and what is loaded at boot.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/messages.h"
#include "core/model_store.h"
#include "engine/engine.h"
#include "hal/hal.h"
#include "hal/verify.h"

namespace edge {

constexpr char kRolledBack[] = "the model in trial was rolled back";

class ModelUpdate {
 public:
  // `verifier` may be null: then signatures are not checked, and HELLO says so.
  ModelUpdate(Hal& hal, Engine& engine, Verifier* verifier)
      : hal_(hal), engine_(engine), verifier_(verifier), store_(hal) {}

  // Loads the active model; if it is damaged, marks it bad and goes back to the stored one. A model that was
  // in trial has not been confirmed: goes back too. What went wrong, if anything did.
  Status boot();

  Status begin(Span body);
  Status chunk(Span body);
  // `scratch` takes the self-test's output. On failure the model that was active goes on. Without `trial` the
  // new one is active for good at once: a gateway of minor version 0 would never confirm it.
  Status commit(uint8_t* scratch, size_t scratch_size, bool trial);
  Status abort();
  // MODEL_CONFIRM (`keep`) and MODEL_ROLLBACK of the model that the body names. Done already: no error.
  Status end_trial(Span body, bool keep);

  // The model that runs failed in inference; `settle` draws the conclusion.
  void failed() { failed_ = true; }
  // Ends a trial that failed or took too long. True if another model runs now, or none.
  bool settle();
  uint64_t trial_left_us() const;

  bool has_engine() const;
  bool verifies() const { return verifier_ != nullptr; }
  int loaded() const { return loaded_; }  // slot, -1: no model
  const ModelInfo& info() const { return info_; }
  const ModelStore& store() const { return store_; }

 private:
  Status fits(const Manifest& manifest);
  Status roll_back(Rollback why, bool discard);
  Status check(size_t index, uint8_t* scratch, size_t scratch_size);
  Status check_signature(const Manifest& manifest);
  Status load(size_t index);
  Status selftest(size_t index, uint8_t* scratch, size_t scratch_size);

  Hal& hal_;
  Engine& engine_;
  Verifier* verifier_;
  ModelStore store_;
  int loaded_ = -1;
  ModelInfo info_;
  bool failed_ = false;
  uint64_t trial_since_us_ = 0;
};

}  // namespace edge
