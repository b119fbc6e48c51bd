#include "engine/engine.h"

namespace edge {
namespace {

class NullEngine final : public Engine {
 public:
  const char* name() override { return "none"; }
  Span operators() override { return {}; }
  uint32_t arena_size() override { return 0; }
  const char* last_error() override { return "built without an engine"; }
  LoadResult load(Span, ModelInfo*) override { return LoadResult::kInvalid; }
  bool invoke(Span, uint8_t*, size_t) override { return false; }
};

}  // namespace

Engine& null_engine() {
  static NullEngine engine;
  return engine;
}

}  // namespace edge
