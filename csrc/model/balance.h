// Outliers, moved from activations into weights before these are quantised.
//
// A row of activations has one int8 scale, so a channel that is far larger than the others costs
// them their precision. Where a norm's weight or an FFN channel makes it large, it can be divided
// by a factor that the columns of the next matrices are multiplied by: the same function, and with
// powers of two the same floating-point numbers. (SmoothQuant's idea, arXiv 2211.10438 section 4,
// with what can be read off the weights in place of calibration data, and only for channels that
// stand out.) V and the attention's output are left alone: cached V mean the same with every dtype.
#pragma once

#include <vector>

#include "base/stored.h"

namespace bicache {

struct StoredFfn {
  StoredMatrix gate, up, down;
};

struct StoredLayer {
  std::vector<float> attention_norm, ffn_norm;  // [E]
  StoredMatrix q, k, v, attention_out;
  std::vector<StoredFfn> ffn;  // one, or one per expert
};

// Factors to divide by (norm weights, rows of `up`) and to multiply by (columns of what follows).
struct LayerBalance {
  std::vector<float> attention;           // [E]: attention_norm; q, k, v
  std::vector<float> ffn;                 // [E]: ffn_norm; gate, up
  std::vector<std::vector<float>> inner;  // [F] per FFN: rows of up; down
};

struct Balance {
  std::vector<LayerBalance> layers;
  std::vector<float> final;  // [E]: final_norm; head
};

Balance balance(const StoredMatrix& embedding, const std::vector<StoredLayer>& layers,
                const std::vector<float>& final_norm, const StoredMatrix& head, int threads);

}  // namespace bicache
