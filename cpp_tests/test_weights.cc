// Weights as they are held, against what the checkpoint stores.
#include "files/checkpoint.h"
#include "support.h"
#include "temp_files.h"
#include "tiny_model.h"

namespace bicache {
namespace {

TEST(Weights, TheEmbeddingIsCopiedInPieces) {
  TinyModel t;
  t.layers = 1;
  t.vocab = 4100;  // two pieces and a part
  const TempFolder folder;
  t.write(folder.path());
  const Checkpoint checkpoint(folder.path());
  const Tensor stored = checkpoint.tensor("model.transformer.wte.weight", {t.vocab, t.dim});
  std::vector<float> x(static_cast<size_t>(t.dim)), expected(x.size());
  for (const DType kept : {DType::f32, DType::bf16}) {
    const auto model = Model::load(folder.path(), Backend::packed, kept, {}, 2);
    for (int32_t token = 0; token < t.vocab; ++token) {
      std::memcpy(expected.data(), stored.bytes.data() + token * t.dim * 4, x.size() * 4);
      if (kept == DType::bf16) expected = to_float(to_bf16(expected));
      model->weights().embed(token, t.dim, x.data());
      ASSERT_TRUE(same_bits(x, expected)) << token;
    }
  }
}

}  // namespace
}  // namespace bicache
