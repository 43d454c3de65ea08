// The fuzz targets without a fuzzer: reproducible mutations of valid files.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "fuzz/fuzz_targets.h"
#include "gguf_image.h"
#include "support.h"
#include "temp_files.h"

namespace bicache {
namespace {

constexpr int kMutations = kThreadSanitizer ? 1000 : 20000;  // in one thread

// std::mt19937 gives the same numbers everywhere; the distributions of <random> do not.
class Mutator {
 public:
  Mutator(unsigned seed, std::vector<std::string> tokens)
      : bits_(seed), tokens_(std::move(tokens)) {}

  size_t below(size_t n) { return bits_() % n; }

  std::string mutate(std::string s) {
    for (size_t edits = 1 + below(4); edits > 0; --edits) edit(&s);
    return s;
  }

 private:
  void edit(std::string* s) {
    const size_t at = below(s->size() + 1), left = s->size() - at;
    const size_t length = std::min(left, 1 + below(16));
    switch (below(8)) {
      case 0:  // flip a bit
        if (left > 0) (*s)[at] = static_cast<char>((*s)[at] ^ (1 << below(8)));
        break;
      case 1:
        if (left > 0) (*s)[at] = static_cast<char>(below(256));
        break;
      case 2:
        s->insert(at, 1, static_cast<char>(below(256)));
        break;
      case 3:
        s->erase(at, length);
        break;
      case 4:
        s->resize(at);
        break;
      case 5:  // repeat a piece elsewhere
        s->insert(below(s->size() + 1), s->substr(at, length));
        break;
      case 6:
        s->insert(at, token());
        break;
      case 7:
        s->replace(at, length, token());
        break;
    }
  }
  const std::string& token() { return tokens_[below(tokens_.size())]; }

  std::mt19937 bits_;
  std::vector<std::string> tokens_;
};

const std::vector<std::string> kTokens = {"{",
                                          "}",
                                          "[",
                                          "]",
                                          ",",
                                          ":",
                                          "\"",
                                          "\\",
                                          "\\u",
                                          "\\ud83d",
                                          "\\ude00",
                                          "-",
                                          "0",
                                          "1e999",
                                          "null",
                                          "true",
                                          "9223372036854775807",
                                          "18446744073709551615",
                                          "4294967296",
                                          "-1",
                                          "\"dtype\"",
                                          "\"shape\"",
                                          "\"data_offsets\"",
                                          "\"__metadata__\"",
                                          "\"F32\"",
                                          "\"F4\"",
                                          "\"U8\"",
                                          "[0,8]",
                                          "[0,0]",
                                          "\xC3\xA9",
                                          "\xED\xA0\x80",
                                          "\xFF",
                                          std::string(1, '\0'),
                                          std::string(70, '['),
                                          std::string(8, '\0'),
                                          std::string(8, '\xFF')};

struct Counts {
  int accepted = 0, refused = 0;
};

// Every byte dropped, every prefix, then mutations of seeds.
template <class Run>
Counts mutate_all(const std::vector<std::string>& seeds, unsigned seed, Run&& run) {
  Counts counts;
  const auto count = [&](const std::string& bytes) {
    ++(run(bytes) ? counts.accepted : counts.refused);
  };
  for (const std::string& bytes : seeds) {
    EXPECT_TRUE(run(bytes)) << bytes;
    for (size_t i = 0; i < bytes.size(); ++i) {
      count(bytes.substr(0, i));
      count(bytes.substr(0, i) + bytes.substr(i + 1));
    }
  }
  Mutator mutator(seed, kTokens);
  for (int i = 0; i < kMutations; ++i) count(mutator.mutate(seeds[mutator.below(seeds.size())]));
  return counts;
}

TEST(FuzzFiles, json_survives_mutations) {
  const std::vector<std::string> seeds = {
      R"({"model_type":"llada","n_layers":32,"eps":1e-05,)"
      R"("list":[1,-2.5,true,false,null],"o":{"k":{}}})",
      R"(["\"\\\/\b\f\n\r\t\u0041\ud83d\ude00", "caf)"
      "\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80\", []]",
      std::string(64, '[') + std::string(64, ']'),
      " -0.0e+10 ",
  };
  const Counts counts = mutate_all(seeds, 1, fuzz::run_json);
  EXPECT_GT(counts.accepted, kMutations / 100);  // the mutations reach both sides
  EXPECT_GT(counts.refused, kMutations / 4);
}

// Once more with the 8 bytes of length set right: otherwise few would come as far as the header.
bool run_repaired(const std::string& bytes) {
  bool accepted = fuzz::run_safetensors(bytes);
  const size_t end = bytes.rfind('}');
  if (bytes.size() > 8 && end != std::string::npos && end >= 8) {
    accepted |= fuzz::run_safetensors(little_endian(end + 1 - 8) + bytes.substr(8));
  }
  return accepted;
}

TEST(FuzzFiles, safetensors_survive_mutations) {
  const std::string data(16, '\1');  // no '}' in it
  const std::vector<std::string> seeds = {
      safetensors_bytes("{" + entry("a", "F32", "[2]", "[0,8]") + "," +
                            entry("b", "BF16", "[2,2]", "[8,16]") +
                            R"(,"__metadata__":{"format":"pt"}})",
                        data),
      safetensors_bytes("{" + entry("z", "F32", "[0,3]", "[0,0]") + "," +
                            entry("y", "U8", "[16]", "[0,16]") + "}",
                        data),
      safetensors_bytes("{" + entry("", "F4", "[4]", "[0,2]") + "}", data.substr(0, 2)),
      safetensors_bytes("{}", ""),
  };
  const Counts counts = mutate_all(seeds, 2, run_repaired);
  EXPECT_GT(counts.accepted, kMutations / 100);
  EXPECT_GT(counts.refused, kMutations / 4);
}

TEST(FuzzFiles, gguf_files_survive_mutations) {
  GgufImage plain, values, blocks;
  plain.text("general.architecture", "llada").uint32("general.alignment", 32);
  plain.tensor("a", {2, 2}, 0, test_bytes(16)).tensor("b", {3}, 30, test_bytes(6));
  values.texts("tokens", {"a", "\xC3\xA9"}).boolean("yes", true).float32("eps", 1e-5f);
  values.value("flags", 9, le32(7) + little_endian(2) + std::string("\1\0", 2));
  blocks.alignment = 8;
  blocks.uint32("general.alignment", 8).tensor("q", {32, 1}, 8, test_bytes(34));
  const std::vector<std::string> seeds = {plain.bytes(), values.bytes(), blocks.bytes()};
  const Counts counts = mutate_all(seeds, 5, fuzz::run_gguf);
  EXPECT_GT(counts.accepted, kMutations / 100);
  EXPECT_GT(counts.refused, kMutations / 4);
}

// As they are, and with right checksums: otherwise few would come behind them.
bool run_resealed(const std::string& bytes) {
  const bool accepted = fuzz::run_prefixes(bytes);
  return fuzz::run_prefixes(resealed(bytes, fuzz::prefix_shape())) || accepted;
}

TEST(FuzzFiles, prefix_files_survive_mutations) {
  using Source = EntryNeeds::Source;
  const StoreShape shape = fuzz::prefix_shape();
  PrefixStore store(1 << 20);
  std::vector<std::string> seeds = {PrefixImage(shape, {}).bytes()};
  for (const auto& [salt, needs] :
       {std::pair<std::string, EntryNeeds>{"", {Source::alone, 2, {1, 3}}},
        {"salt", {Source::first_request, 4, {}}},
        {"salt", {Source::alone, 0, {}}}}) {
    const std::vector<int32_t> ids = {1, 2};
    auto entry = std::make_shared<PrefixEntry>(2, shape.kv_width, shape.dim, needs, shape.types);
    for (const auto part : entry->parts()) std::fill(part.begin(), part.end(), std::byte{1});
    store.insert({ids, needs.source, salt}, std::move(entry));
    seeds.push_back(PrefixImage(shape, store.items()).bytes());
  }
  const Counts counts = mutate_all(seeds, 4, run_resealed);
  EXPECT_GT(counts.accepted, kMutations / 100);
  EXPECT_GT(counts.refused, kMutations / 4);
}

// Pure noise finds nothing in the readers, but might in the frame.
TEST(FuzzFiles, noise_is_refused_or_read) {
  std::mt19937 bits(3);
  for (int i = 0; i < 2000; ++i) {
    std::string bytes(bits() % 64, '\0');
    for (char& c : bytes) c = static_cast<char>(bits() % 256);
    EXPECT_NO_THROW(fuzz::run_json(bytes));
    EXPECT_NO_THROW(fuzz::run_safetensors(bytes));
    EXPECT_NO_THROW(fuzz::run_gguf(bytes));
    EXPECT_NO_THROW(fuzz::run_prefixes(bytes));
  }
}

// The targets' own decoder is the judge of strings: it must know good from bad.
TEST(FuzzFiles, the_judge_knows_utf8) {
  for (const char* good :
       {"", "a", "\xC2\x80", "\xE0\xA0\x80", "\xEF\xBF\xBF", "\xF4\x8F\xBF\xBF"}) {
    EXPECT_TRUE(fuzz::is_utf8(good)) << good;
  }
  for (const char* bad :
       {"\x80", "\xC1\xBF", "\xC2", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80", "\xC2\x41"}) {
    EXPECT_FALSE(fuzz::is_utf8(bad)) << bad;
  }
}

}  // namespace
}  // namespace bicache
