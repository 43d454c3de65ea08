// libFuzzer: the GGUF reader.
#include "fuzz/fuzz_targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  bicache::fuzz::run_gguf({reinterpret_cast<const char*>(data), size});
  return 0;
}
