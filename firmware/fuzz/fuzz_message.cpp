// Any body into every parser.
#include <cstdlib>
#include <cstring>

#include "core/messages.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // At its exact size on the heap: one byte too far is seen.
  uint8_t* copy = static_cast<uint8_t*>(malloc(size + 1));
  uint8_t* body = copy + 1;
  if (size > 0) memcpy(body, data, size);
  const edge::Span span{body, size};

  edge::HelloReq hello;
  edge::Infer infer;
  edge::Fragment fragment;
  edge::ModelChunk chunk;
  edge::StreamStart stream;
  edge::Manifest manifest;
  hello.parse(span);
  if (infer.parse(span) && infer.inputs.size > size) abort();
  if (fragment.parse(span) && fragment.data.size > size) abort();
  if (chunk.parse(span) && chunk.data.size > size) abort();
  if (stream.parse(span) && (stream.interval_ms == 0 || stream.interval_ms > edge::kMaxIntervalMs)) abort();
  if (manifest.parse(span)) {
    uint8_t written[edge::kManifestSize];
    edge::Writer out(written, sizeof written);
    manifest.write(out);
    if (!out.ok() || memcmp(written, body, manifest.signed_size()) != 0) abort();
  }
  free(copy);
  return 0;
}
