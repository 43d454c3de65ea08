// GGUF files as the folders they were made from: names, rows, configuration, files of one model.
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "base/check.h"
#include "files/checkpoint.h"
#include "gguf_image.h"
#include "model/config.h"

namespace bicache {
namespace {

using Change = std::function<void(GgufImage&)>;

std::string floats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

std::string zeros(size_t count) { return floats(std::vector<float>(count)); }

// Metadata of a model of one layer, E 8, two heads, F 16, V 5.
GgufImage facts(const std::string& architecture) {
  const std::string prefix = architecture + ".";
  GgufImage image;
  image.text("general.architecture", architecture);
  image.uint32(prefix + "block_count", 1).uint32(prefix + "embedding_length", 8);
  image.uint32(prefix + "context_length", 64).uint32(prefix + "feed_forward_length", 16);
  image.uint32(prefix + "attention.head_count", 2);
  image.float32(prefix + "attention.layer_norm_rms_epsilon", 1e-5f);
  image.float32(prefix + "rope.freq_base", 500000.0f);
  image.uint32("tokenizer.ggml.mask_token_id", 4).uint32("tokenizer.ggml.eos_token_id", 1);
  return image;
}

GgufImage llada() {
  GgufImage image = facts("llada");
  image.tensor("token_embd.weight", {8, 5}, 0, zeros(40));
  image.tensor("output.weight", {8, 5}, 0, zeros(40));
  std::vector<float> q(64);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i / 8);  // its row
  image.tensor("blk.0.attn_q.weight", {8, 8}, 0, floats(q));
  image.tensor("blk.0.attn_v.weight", {8, 8}, 0, floats(q));
  return image;
}

ModelConfig config_of(const Checkpoint& c) {
  return ModelConfig::parse(c.config(), c.config_path());
}

TEST(GgufCheckpoint, names_and_rows_are_the_folders) {
  const TempFolder folder;
  const std::string path = folder.write("m.gguf", llada().bytes());
  const Checkpoint c(path);
  EXPECT_EQ(c.folder(), path);
  EXPECT_EQ(c.names(), (std::vector<std::string>{"model.transformer.blocks.0.q_proj.weight",
                                                 "model.transformer.blocks.0.v_proj.weight",
                                                 "model.transformer.ff_out.weight",
                                                 "model.transformer.wte.weight"}));
  EXPECT_TRUE(c.has("model.transformer.wte.weight"));
  EXPECT_FALSE(c.has("token_embd.weight"));
  EXPECT_EQ(c.size_bytes(), 2 * 160 + 2 * 256);
  EXPECT_EQ(c.stored().size(), 4u);
  EXPECT_EQ(c.stored()[0].name, "blk.0.attn_q.weight");
  // Heads of four rows: llama.cpp has row i of the first half before row i of the second.
  const float q_rows[] = {0, 2, 1, 3, 4, 6, 5, 7};
  const Tensor q = c.tensor("model.transformer.blocks.0.q_proj.weight", {8, 8});
  const Tensor v = c.tensor("model.transformer.blocks.0.v_proj.weight", {8, 8});
  std::vector<float> row(8);
  for (int64_t i = 0; i < 8; ++i) {
    q.matrix().row(i, row.data());
    EXPECT_EQ(row, std::vector<float>(8, q_rows[i])) << i;
    v.matrix().row(i, row.data());
    EXPECT_EQ(row, std::vector<float>(8, static_cast<float>(i))) << i;
  }
  EXPECT_EQ(error_of<std::invalid_argument>(
                [&] { c.tensor("model.transformer.blocks.0.q_proj.weight", {4, 8}); }),
            "[" + path + "] tensor blk.0.attn_q.weight: expected shape [4, 8], got [8, 8]");
}

TEST(GgufCheckpoint, configuration_of_llada) {
  const TempFolder folder;
  GgufImage image = llada();
  image.uint32("llada.vocab_size", 4).uint32("llada.attention.head_count_kv", 1);
  image.uint32("tokenizer.ggml.eot_token_id", 2).boolean("diffusion.shift_logits", true);
  const ModelConfig c = config_of(Checkpoint(folder.write("m.gguf", image.bytes())));
  EXPECT_EQ(c.family, "llada");
  EXPECT_EQ(c.layers, 1);
  EXPECT_EQ(c.dim, 8);
  EXPECT_EQ(c.heads, 2);
  EXPECT_EQ(c.kv_heads, 1);
  EXPECT_EQ(c.head_dim, 4);
  EXPECT_EQ(c.ffn, 16);
  EXPECT_EQ(c.vocab, 4);
  EXPECT_EQ(c.embeddings, 5);
  EXPECT_EQ(c.context, 64);
  EXPECT_EQ(c.norm_eps, 1e-5f);
  EXPECT_EQ(c.rope_theta, 500000);
  EXPECT_EQ(c.shift, 1);
  EXPECT_EQ(c.mask_token_id, 4);
  EXPECT_EQ(c.eos_token_id, 1);
  EXPECT_EQ(c.eot_token_id, 2);
}

TEST(GgufCheckpoint, what_a_file_may_leave_out) {
  const TempFolder folder;
  GgufImage image = llada();
  std::erase_if(image.values, [](const std::string& v) {
    return v.find("mask_token_id") != std::string::npos || v.find("freq_base") != std::string::npos;
  });
  image.texts("tokenizer.ggml.tokens", {"a", "b", "<|mdm_mask|>", "d"});
  const ModelConfig c = config_of(Checkpoint(folder.write("m.gguf", image.bytes())));
  EXPECT_EQ(c.mask_token_id, 2);
  EXPECT_EQ(c.vocab, 4);
  EXPECT_EQ(c.kv_heads, 2);
  EXPECT_EQ(c.rope_theta, 10000);
  EXPECT_EQ(c.shift, 0);
  EXPECT_EQ(c.eot_token_id, -1);
}

TEST(GgufCheckpoint, a_head_that_is_the_embedding) {
  const TempFolder folder;
  GgufImage image = facts("llada");
  image.tensor("token_embd.weight", {8, 5}, 0, test_bytes(160));
  const Checkpoint c(folder.write("m.gguf", image.bytes()));
  EXPECT_EQ(c.tensor("model.transformer.ff_out.weight", {5, 8}).bytes.data(),
            c.tensor("model.transformer.wte.weight", {5, 8}).bytes.data());
  EXPECT_EQ(c.size_bytes(), 160);
}

// Dream's rows are as they were, and its keys are Qwen2's.
TEST(GgufCheckpoint, dream) {
  const TempFolder folder;
  GgufImage image = facts("dream");
  image.tensor("token_embd.weight", {8, 5}, 0, zeros(40));
  image.tensor("blk.0.attn_q.weight", {8, 8}, 0, zeros(64));
  image.tensor("blk.0.attn_q.bias", {8}, 0, zeros(8));
  const Checkpoint c(folder.write("m.gguf", image.bytes()));
  EXPECT_EQ(c.tensor("model.layers.0.self_attn.q_proj.weight").interleaved_head, 0);
  EXPECT_EQ(c.tensor("model.layers.0.self_attn.q_proj.bias").shape, std::vector<int64_t>{8});
  const auto integer = [&](const char* key) { return c.config().find(key)->integer("w", key); };
  EXPECT_EQ(c.config().find("model_type")->string("w"), "Dream");
  EXPECT_EQ(integer("hidden_size"), 8);
  EXPECT_EQ(integer("num_hidden_layers"), 1);
  EXPECT_EQ(integer("num_attention_heads"), 2);
  EXPECT_EQ(integer("num_key_value_heads"), 2);
  EXPECT_EQ(integer("intermediate_size"), 16);
  EXPECT_EQ(integer("max_position_embeddings"), 64);
  EXPECT_EQ(integer("vocab_size"), 5);
}

// llama.cpp keeps the experts of a layer in one tensor.
TEST(GgufCheckpoint, experts_are_parts_of_a_tensor) {
  const TempFolder folder;
  GgufImage image = facts("llada-moe");
  image.uint32("llada-moe.expert_count", 3).uint32("llada-moe.expert_used_count", 2);
  image.tensor("token_embd.weight", {8, 5}, 0, zeros(40));
  const std::string bytes = test_bytes(3 * 4 * 34);  // three of [4, 32] in Q8_0
  image.tensor("blk.0.ffn_down_exps.weight", {32, 4, 3}, 8, bytes);
  const Checkpoint c(folder.write("m.gguf", image.bytes()));
  for (size_t e = 0; e < 3; ++e) {
    const Tensor t =
        c.tensor("model.layers.0.mlp.experts." + std::to_string(e) + ".down_proj.weight", {4, 32});
    EXPECT_EQ((std::string{reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size()}),
              bytes.substr(e * 136, 136));
  }
  EXPECT_EQ(c.config().find("num_experts_per_tok")->integer("w"), 2);
  EXPECT_EQ(c.config().find("expert_intermediate_size")->integer("w"), 8);
}

// A model in two files.
void write_split(const TempFolder& folder, const Change& first = {}, const Change& second = {}) {
  GgufImage a = facts("llada"), b;
  for (GgufImage* image : {&a, &b}) image->value("split.count", 2, std::string("\2\0", 2));
  a.value("split.no", 2, std::string("\0\0", 2)).value("split.tensors.count", 5, le32(2));
  b.value("split.no", 2, std::string("\1\0", 2));
  a.tensor("token_embd.weight", {8, 5}, 0, zeros(40));
  b.tensor("output_norm.weight", {8}, 0, zeros(8));
  if (first) first(a);
  if (second) second(b);
  folder.write("m-00001-of-00002.gguf", a.bytes());
  folder.write("m-00002-of-00002.gguf", b.bytes());
}

TEST(GgufCheckpoint, several_files) {
  const TempFolder folder;
  write_split(folder);
  const Checkpoint c(folder.at("m-00001-of-00002.gguf"));
  EXPECT_TRUE(c.has("model.transformer.ln_f.weight"));
  EXPECT_EQ(c.stored().size(), 2u);
  const auto refused = [&](const std::string& name) {
    return error_of<std::invalid_argument>([&] { Checkpoint bad(folder.at(name)); });
  };
  EXPECT_TRUE(contains(refused("m-00002-of-00002.gguf"), "general.architecture: expected text"));
  write_split(folder, {}, [](GgufImage& i) { i.tensor("token_embd.weight", {8}, 0, zeros(8)); });
  EXPECT_TRUE(contains(refused("m-00001-of-00002.gguf"), "split.tensors.count: expected 3"));
  write_split(folder, {}, [](GgufImage& i) {
    i = GgufImage();
    i.value("split.count", 2, std::string("\2\0", 2)).value("split.no", 2, std::string("\1\0", 2));
    i.tensor("token_embd.weight", {8}, 0, zeros(8));
  });
  EXPECT_TRUE(contains(refused("m-00001-of-00002.gguf"), "expected once in all files"));
  write_split(folder, {}, [](GgufImage& i) { i.values.pop_back(); });
  EXPECT_TRUE(contains(refused("m-00001-of-00002.gguf"),
                       "00002.gguf: split.no, split.count: expected 1, 2, got -1, 2"));
  std::filesystem::rename(folder.at("m-00001-of-00002.gguf"), folder.at("other.gguf"));
  EXPECT_TRUE(
      contains(refused("other.gguf"), "expected a name that ends with -00001-of-00002.gguf"));
  write_split(folder);
  std::filesystem::remove(folder.at("m-00002-of-00002.gguf"));
  EXPECT_THROW(Checkpoint(folder.at("m-00001-of-00002.gguf")), FileError);
}

struct BadModel {
  const char* name;
  Change change;
  std::string expected;  // part of the message
};
void PrintTo(const BadModel& c, std::ostream* out) { *out << c.name; }

class GgufModelErrors : public testing::TestWithParam<BadModel> {};

TEST_P(GgufModelErrors, name_the_key) {
  const TempFolder folder;
  ASSERT_NO_THROW(config_of(Checkpoint(folder.write("m.gguf", llada().bytes()))));
  GgufImage image = llada();
  GetParam().change(image);
  const std::string path = folder.write("m.gguf", image.bytes());
  const std::string message = error_of<std::invalid_argument>([&] {
    const Checkpoint c(path);
    config_of(c);
    for (const std::string& name : c.names()) c.tensor(name);
  });
  EXPECT_TRUE(contains(message, path));
  EXPECT_TRUE(contains(message, GetParam().expected));
}

// Without the key.
Change without(const std::string& key) {
  return [=](GgufImage& i) {
    std::erase_if(i.values, [&](const std::string& v) { return v.substr(8).starts_with(key); });
  };
}

// With `x` for it.
Change set(const std::string& key, uint32_t x) {
  return [=](GgufImage& i) {
    without(key)(i);
    i.uint32(key, x);
  };
}

const BadModel kBadModels[] = {
    {"no_architecture", without("general.architecture"),
     "general.architecture: expected text, got nothing"},
    {"architecture_type", set("general.architecture", 3),
     "general.architecture: expected text, got uint32"},
    {"architecture",
     [](GgufImage& i) {
       without("general.architecture")(i);
       i.text("general.architecture", "llama");
     },
     "general.architecture: expected one of llada, dream, llada-moe, got \"llama\""},
    {"no_layers", without("llada.block_count"),
     "llada.block_count: expected an integer, got nothing"},
    {"layers_type",
     [](GgufImage& i) {
       without("llada.block_count")(i);
       i.text("llada.block_count", "1");
     },
     "llada.block_count: expected an integer, got string"},
    {"layers_0", set("llada.block_count", 0), "n_layers: expected 1..4096, got 0"},
    {"no_width", without("llada.embedding_length"), "llada.embedding_length: expected an integer"},
    {"heads_0", set("llada.attention.head_count", 0), "attention.head_count: expected a divisor"},
    {"heads_3", set("llada.attention.head_count", 3), "attention.head_count: expected a divisor"},
    {"heads_of_one", set("llada.attention.head_count", 8), "into even heads, got 8"},
    {"heads_per_layer",
     [](GgufImage& i) {
       without("llada.attention.head_count")(i);
       i.value("llada.attention.head_count", 9, le32(4) + little_endian(1) + le32(2));
     },
     "attention.head_count: expected an integer, got an array of uint32"},
    {"no_eps", without("llada.attention.layer_norm_rms_epsilon"),
     "layer_norm_rms_epsilon: expected a number, got nothing"},
    {"eps_nan",
     [](GgufImage& i) {
       without("llada.attention.layer_norm_rms_epsilon")(i);
       i.value("llada.attention.layer_norm_rms_epsilon", 6, le32(0x7fc00000));
     },
     "layer_norm_rms_epsilon: expected a finite number"},
    {"no_context", without("llada.context_length"), "llada.context_length: expected an integer"},
    {"no_mask", without("tokenizer.ggml.mask_token_id"),
     "tokenizer.ggml.mask_token_id: expected an integer, or a token <|mdm_mask|> or <|mask|>"},
    {"mask_beyond", set("tokenizer.ggml.mask_token_id", 5), "mask_token_id: expected 0..4, got 5"},
    {"causal", [](GgufImage& i) { i.boolean("llada.attention.causal", true); },
     "llada.attention.causal: expected false (a diffusion model), got true"},
    {"scaling", [](GgufImage& i) { i.text("llada.rope.scaling.type", "yarn"); },
     "llada.rope.scaling.type: expected \"none\" (nothing else is supported), got \"yarn\""},
    {"part_of_rope", set("llada.rope.dimension_count", 2),
     "llada.rope.dimension_count: expected 4 (nothing else is supported), got 2"},
    {"shift_type", set("diffusion.shift_logits", 0),
     "diffusion.shift_logits: expected a boolean, got uint32"},
    {"no_embedding",
     [](GgufImage& i) {
       i.table.clear();
       i.data.clear();
     },
     "tensor token_embd.weight: expected a matrix, got none"},
    {"part_of_a_head", [](GgufImage& i) { i.tensor("blk.1.attn_k.weight", {8, 6}, 0, zeros(48)); },
     "tensor blk.1.attn_k.weight: expected whole heads of 4 rows, got [6, 8]"},
    {"type_not_read",
     [](GgufImage& i) { i.tensor("output_norm.weight", {256}, 10, test_bytes(84)); },
     "tensor output_norm.weight: expected one of the types f32, f16, bf16, Q4_0"},
    {"split_count", set("split.count", 100000), "split.count: expected 1..1024, got 100000"},
};

INSTANTIATE_TEST_SUITE_P(All, GgufModelErrors, testing::ValuesIn(kBadModels),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace bicache
