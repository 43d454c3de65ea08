// The number types of GGUF files (github.com/ggml-org/ggml: ggml.h, ggml-quants.h).
#pragma once

#include <cstdint>
#include <string>

#include "base/stored.h"

namespace bicache {

// The type that a file calls `id`; null if there is none. One whose `widen` is null is known by its
// size only.
const Format* ggml_format(uint32_t id);

// Names of the types that can be read: "F32, F16, ...".
std::string readable_ggml_types();

}  // namespace bicache
