// GGUF files: what they hold, and every rule that one can break.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <functional>
#include <string>

#include "base/check.h"
#include "files/ggml_types.h"
#include "files/gguf.h"
#include "gguf_image.h"

namespace bicache {
namespace {

using namespace std::string_literals;

constexpr uint32_t kF32 = 0, kF16 = 1, kQ8 = 8, kQ4K = 12, kQ2K = 10;

std::string text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// 24 bytes of float32 [2, 3] and a block of Q8_0.
GgufImage good() {
  GgufImage image;
  image.text("general.architecture", "llada").uint32("n", 7);
  image.tensor("a", {3, 2}, kF32, test_bytes(24)).tensor("b", {32}, kQ8, test_bytes(34));
  return image;
}

TEST(Gguf, reads_tensors) {
  const TempFolder folder;
  for (const uint32_t version : {2u, 3u}) {
    GgufImage image = good();
    image.version = version;
    const Gguf file(folder.write("m.gguf", image.bytes()));
    ASSERT_EQ(file.tensors().size(), 2u);
    const GgufTensor &a = file.tensors().at("a"), &b = file.tensors().at("b");
    EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));
    EXPECT_EQ(a.format, &kStoredF32);
    EXPECT_EQ(text(file.data(a)), test_bytes(24));
    EXPECT_EQ(b.shape, (std::vector<int64_t>{32}));
    EXPECT_STREQ(b.format->name, "Q8_0");
    EXPECT_EQ(text(file.data(b)), test_bytes(34));
    EXPECT_NO_THROW(file.check_size());
    ASSERT_EQ(::truncate(file.path().c_str(), 64), 0);
    EXPECT_THROW(file.check_size(), std::invalid_argument);
  }
}

TEST(Gguf, needs_no_padding_behind_the_last_tensor_and_no_tensors) {
  const TempFolder folder;
  std::string bytes = good().bytes();
  bytes.resize(bytes.size() - 30);
  EXPECT_EQ(Gguf(folder.write("m.gguf", bytes)).tensors().size(), 2u);
  const Gguf empty(folder.write("e.gguf", GgufImage().bytes()));
  EXPECT_TRUE(empty.tensors().empty() && empty.metadata().empty());
}

TEST(Gguf, alignment_is_the_files) {
  const TempFolder folder;
  for (const uint32_t alignment : {1u, 8u, 64u}) {
    GgufImage image;
    image.alignment = alignment;
    image.uint32("general.alignment", alignment);
    image.tensor("a", {1}, kF32, "1234").tensor("b", {3}, kF16, "abcdef");
    const Gguf file(folder.write("m.gguf", image.bytes()));
    EXPECT_EQ(text(file.data(file.tensors().at("b"))), "abcdef") << alignment;
  }
}

TEST(Gguf, reads_every_type_of_value) {
  const TempFolder folder;
  GgufImage image;
  image.value("u8", 0, "\xFF").value("i8", 1, "\xFF").value("u16", 2, "\xFE\xFF");
  image.value("i16", 3, "\xFE\xFF").uint32("u32", 0xFFFFFFFF).value("i32", 5, le32(0xFFFFFFFF));
  image.float32("f32", 0.1f).boolean("yes", true).text("s", "caf\xC3\xA9");
  image.value("u64", 10, little_endian(~uint64_t{0})).value("i64", 11, little_endian(~uint64_t{0}));
  image.value("f64", 12, little_endian(std::bit_cast<uint64_t>(0.1)));
  image.texts("texts", {"", "a", "bc"}).value("ints", 9, le32(2) + little_endian(2) + "\1\0\2\0"s);
  image.value("none", 9, le32(8) + little_endian(0));
  const Gguf file(folder.write("m.gguf", image.bytes()));
  const auto at = [&](const char* key) -> const GgufValue& { return file.metadata().at(key); };
  EXPECT_EQ(at("u8").integer("w", "k"), 255);
  EXPECT_EQ(at("i8").integer("w", "k"), -1);
  EXPECT_EQ(at("u16").integer("w", "k"), 65534);
  EXPECT_EQ(at("i16").integer("w", "k"), -2);
  EXPECT_EQ(at("u32").integer("w", "k"), 4294967295);
  EXPECT_EQ(at("i32").integer("w", "k"), -1);
  EXPECT_EQ(at("i64").integer("w", "k"), -1);
  EXPECT_EQ(at("f32").number("w", "k"), 0.1f);
  EXPECT_EQ(at("f64").number("w", "k"), 0.1);
  EXPECT_EQ(at("u8").number("w", "k"), 255);
  EXPECT_EQ(at("u64").number("w", "k"), 0x1p64);
  EXPECT_TRUE(at("yes").boolean("w", "k"));
  EXPECT_EQ(at("s").string("w", "k"), "caf\xC3\xA9");
  using Element = GgufValue::Element;
  EXPECT_EQ(
      at("texts").elements(),
      (std::vector<Element>{std::string_view(""), std::string_view("a"), std::string_view("bc")}));
  EXPECT_EQ(at("ints").elements(), (std::vector<Element>{int64_t{1}, int64_t{2}}));
  EXPECT_EQ(at("none").elements(), std::vector<Element>());
  EXPECT_EQ(at("texts").type_name(), "array of string");
  const auto message = [](auto&& f) { return error_of<std::invalid_argument>(f); };
  EXPECT_EQ(message([&] { at("s").integer("w", "k"); }), "[w] k: expected an integer, got string");
  EXPECT_EQ(message([&] { at("f32").integer("w", "k"); }),
            "[w] k: expected an integer, got float32");
  EXPECT_EQ(message([&] { at("u64").integer("w", "k"); }),
            "[w] k: expected an integer that 63 bits hold, got a larger one");
  EXPECT_EQ(message([&] { at("yes").number("w", "k"); }), "[w] k: expected a number, got bool");
  EXPECT_EQ(message([&] { at("u8").boolean("w", "k"); }), "[w] k: expected a boolean, got uint8");
  EXPECT_EQ(message([&] { at("u8").string("w", "k"); }), "[w] k: expected text, got uint8");
  EXPECT_EQ(message([&] { at("ints").integer("w", "k"); }),
            "[w] k: expected an integer, got an array of uint16");
}

struct BadFile {
  const char* name;
  std::function<std::string()> bytes;
  std::string expected;  // part of the message
};
void PrintTo(const BadFile& c, std::ostream* out) { *out << c.name; }

class GgufErrors : public testing::TestWithParam<BadFile> {};

TEST_P(GgufErrors, name_the_file_and_the_rule) {
  const TempFolder folder;
  const std::string path = folder.write("m.gguf", GetParam().bytes());
  const std::string message = error_of<std::invalid_argument>([&] { Gguf bad(path); });
  EXPECT_TRUE(message.starts_with("[gguf] " + path + ": ")) << message;
  EXPECT_TRUE(contains(message, GetParam().expected));
}

// The good file, with one thing changed.
using Change = std::function<void(GgufImage&)>;
std::function<std::string()> with(Change change) {
  return [=] {
    GgufImage image = good();
    change(image);
    return image.bytes();
  };
}

std::function<std::string()> table_entry(const std::string& name,
                                         const std::vector<uint64_t>& sizes, uint32_t type,
                                         uint64_t offset) {
  return with([=](GgufImage& i) { i.entry(name, sizes, type, offset); });
}

std::function<std::string()> value(uint32_t type, const std::string& bytes) {
  return with([=](GgufImage& i) { i.value("key", type, bytes); });
}

std::function<std::string()> replaced(size_t at, const std::string& by) {
  return [=] { return good().bytes().replace(at, by.size(), by); };
}

constexpr uint64_t kHuge = uint64_t{1} << 61;

const BadFile kBadFiles[] = {
    {"empty", [] { return ""s; }, "magic: expected 4 bytes, got 0 before the end of the file"},
    {"magic", replaced(0, "GGML"), "magic: expected \"GGUF\", got \"GGML\""},
    {"version_0", replaced(4, le32(0)), "version: expected 2 or 3, got 0"},
    {"version_1", replaced(4, le32(1)), "got 1 (its counts have 32 bits)"},
    {"version_4", replaced(4, le32(4)), "version: expected 2 or 3, got 4"},
    {"big_endian", replaced(4, "\0\0\0\3"s), "byte order: expected little endian, got big endian"},
    {"no_counts", [] { return good().bytes().substr(0, 20); },
     "number of tensors: expected at most 0, which the 4 bytes behind it can hold, got 2"},
    {"too_many_tensors", replaced(8, little_endian(~uint64_t{0})),
     "number of tensors: expected at most "},
    {"too_many_values", replaced(16, little_endian(1000000)),
     "number of key-values: expected at most "},
    {"one_value_too_many", with([](GgufImage& i) {
       i.table.clear();
       i.data.clear();
       i.more_values = 1;
     }),
     "key 2: expected 8 bytes, got 0 before the end of the file"},
    {"one_tensor_too_many", with([](GgufImage& i) { i.more_tensors = 1; }), "tensor 2"},

    {"key_empty", with([](GgufImage& i) { i.uint32("", 1); }),
     "key 2: expected 1..65535 bytes, got 0"},
    {"key_long", with([](GgufImage& i) { i.uint32(std::string(65536, 'k'), 1); }),
     "key 2: expected 1..65535 bytes, got 65536"},
    {"key_with_nul", with([](GgufImage& i) { i.uint32("a\0b"s, 1); }),
     "key 2: expected no NUL character, got \"a\\x00b\""},
    {"key_not_utf8", with([](GgufImage& i) { i.uint32("a\xFF", 1); }),
     "key 2: expected UTF-8, got \"a\\xff\""},
    {"key_twice", with([](GgufImage& i) { i.uint32("n", 8); }),
     "key n: expected once, got it again"},
    {"key_beyond_the_end",
     with([](GgufImage& i) { i.values.push_back(little_endian(kHuge) + le32(4)); }),
     "key 2: expected text of at most the "},
    {"value_type", value(13, ""), "value of key: expected a type of 0..12, got 13"},
    {"value_of_arrays", value(9, le32(9) + little_endian(0)),
     "value of key: expected an array of plain values, got one of arrays"},
    {"element_type", value(9, le32(99) + little_endian(0)),
     "value of key, elements: expected a type of 0..12, got 99"},
    {"array_beyond_the_end", value(9, le32(0) + little_endian(kHuge)),
     "value of key, number of elements: expected at most "},
    {"texts_beyond_the_end", value(9, le32(8) + little_endian(40)),
     "value of key, number of elements: expected at most "},
    {"text_beyond_the_end", value(8, little_endian(1000)),
     "value of key: expected text of at most"},
    {"text_length_wraps", value(8, little_endian(~uint64_t{7})),
     "value of key: expected text of at most"},
    {"text_not_utf8", value(8, gguf_text("\xC0\x80")), "value of key: expected UTF-8"},
    {"element_not_utf8", value(9, le32(8) + little_endian(1) + gguf_text("\xED\xA0\x80")),
     "value of key: expected UTF-8"},
    {"boolean", value(7, "\2"), "value of key: expected 0 or 1 for a boolean, got 2"},
    {"element_boolean", value(9, le32(7) + little_endian(2) + "\1\3"),
     "value of key: expected 0 or 1 for a boolean, got 3"},
    {"alignment_0", with([](GgufImage& i) { i.uint32("general.alignment", 0); }),
     "general.alignment: expected a power of two, got 0"},
    {"alignment_24", with([](GgufImage& i) { i.uint32("general.alignment", 24); }),
     "general.alignment: expected a power of two, got 24"},
    {"alignment_type", with([](GgufImage& i) { i.value("general.alignment", 2, "\40\0"s); }),
     "general.alignment: expected uint32, got uint16"},
    {"alignment_array",
     with([](GgufImage& i) { i.value("general.alignment", 9, le32(4) + little_endian(0)); }),
     "general.alignment: expected uint32, got array of uint32"},
    {"alignment_beyond_the_end",
     with([](GgufImage& i) { i.uint32("general.alignment", 0x80000000); }),
     "data: expected it at byte 2147483648"},
    {"other_alignment", with([](GgufImage& i) { i.uint32("general.alignment", 128); }),
     "tensor b, offset: expected a multiple of the alignment 128, got 32"},

    {"name_empty", table_entry("", {1}, kF32, 96), "name of tensor 2: expected 1..64 bytes, got 0"},
    {"name_long", table_entry(std::string(65, 't'), {1}, kF32, 96),
     "name of tensor 2: expected 1..64 bytes, got 65"},
    {"name_with_nul", table_entry("a\0"s, {1}, kF32, 96), "name of tensor 2: expected no NUL"},
    {"name_not_utf8", table_entry("\x80", {1}, kF32, 96), "name of tensor 2: expected UTF-8"},
    {"name_twice", table_entry("a", {1}, kF32, 96), "tensor a: expected once, got it again"},
    {"no_dimensions", table_entry("c", {}, kF32, 96), "tensor c: expected 1..4 dimensions, got 0"},
    {"five_dimensions", table_entry("c", {1, 1, 1, 1, 1}, kF32, 96),
     "tensor c: expected 1..4 dimensions, got 5"},
    {"size_0", table_entry("c", {4, 0}, kF32, 96),
     "tensor c, shape: expected positive sizes, got 0"},
    {"size_negative", table_entry("c", {~uint64_t{0}}, kF32, 96),
     "tensor c, shape: expected positive sizes, got 18446744073709551615"},
    {"elements_overflow", table_entry("c", {kHuge, kHuge}, kF32, 96),
     "tensor c, shape: expected bytes that 63 bits count"},
    {"bytes_overflow", table_entry("c", {kHuge, 3}, kF32, 96),
     "tensor c, shape: expected bytes that 63 bits count"},
    {"part_of_a_block", table_entry("c", {48}, kQ8, 96),
     "tensor c, shape: expected rows of a multiple of 32 numbers for Q8_0, got 48"},
    {"blocks_across_rows", table_entry("c", {128, 2}, kQ4K, 96),
     "expected rows of a multiple of 256 numbers for Q4_K, got 128"},
    {"type", table_entry("c", {1}, 4, 96), "tensor c, type: expected one of the format's, got 4"},
    {"type_huge", table_entry("c", {1}, ~0u, 96), "type: expected one of the format's"},
    {"offset_unaligned", table_entry("c", {1}, kF32, 97),
     "tensor c, offset: expected a multiple of the alignment 32, got 97"},
    {"offset_overlaps", table_entry("c", {1}, kF32, 64),
     "tensor c, offset: expected 96, where the tensor before it ends, got 64 (an overlap)"},
    {"offset_leaves_a_gap", table_entry("c", {1}, kF32, 128),
     "tensor c, offset: expected 96, where the tensor before it ends, got 128 (a gap)"},
    {"offset_huge", table_entry("c", {1}, kF32, ~uint64_t{31}),
     "tensor c, offset: expected one within the file"},
    {"data_missing", table_entry("c", {1}, kF32, 96),
     "tensor c: expected its 4 bytes at 96 within the 96 bytes of data (is the file truncated?)"},
    {"data_huge", table_entry("c", {kHuge / 4}, kF32, 96),
     "expected its 2305843009213693952 bytes at 96 within the 96 bytes of data"},
    {"truncated", [] { return good().bytes().substr(0, good().bytes().size() - 31); },
     "tensor b: expected its 34 bytes at 32 within the 65 bytes of data"},
    {"no_data",
     [] {
       GgufImage image = good().uint32("k", 1);
       return image.bytes().substr(0, image.bytes().size() - image.data.size() - 1);
     },
     "data: expected it at byte "},
    {"trailing", [] { return good().bytes() + std::string(32, '\0'); },
     "data: expected 66 bytes, where the last tensor ends, and padding, got 128 (trailing bytes)"},
};

INSTANTIATE_TEST_SUITE_P(All, GgufErrors, testing::ValuesIn(kBadFiles),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Gguf, is_a_file) {
  const TempFolder folder;
  EXPECT_THROW(Gguf(folder.at("none.gguf")), FileError);
  EXPECT_THROW(Gguf(folder.path()), std::invalid_argument);
}

// The formats' own properties; tests/test_gguf.py compares values with another reader's.
TEST(GgmlTypes, halves_are_exact) {
  const Format& f16 = *ggml_format(kF16);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint8_t bytes[2] = {static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8)};
    float x;
    f16.widen(reinterpret_cast<const std::byte*>(bytes), 1, &x);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    ASSERT_EQ(std::signbit(x), bits >> 15 != 0) << bits;
    if (exponent == 31) {
      ASSERT_EQ(std::isnan(x), fraction != 0) << bits;
      ASSERT_EQ(std::isinf(x), fraction == 0) << bits;
    } else {
      const double expected =
          exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      ASSERT_EQ(std::abs(x), expected) << bits;
    }
  }
}

TEST(GgmlTypes, blocks_do_not_depend_on_their_neighbours) {
  int read = 0;
  for (uint32_t id = 0; id < 64; ++id) {
    const Format* f = ggml_format(id);
    if (f == nullptr || f->widen == nullptr) continue;
    ++read;
    const std::string bytes = test_bytes(static_cast<size_t>(3 * f->block_bytes) + 1);
    const auto* at = reinterpret_cast<const std::byte*>(bytes.data()) + 1;  // not aligned
    const auto size = static_cast<size_t>(f->block);
    std::vector<float> all(3 * size), one(size);
    f->widen(at, 3, all.data());
    for (size_t b = 0; b < 3; ++b) {
      f->widen(at + b * static_cast<size_t>(f->block_bytes), 1, one.data());
      for (size_t i = 0; i < size; ++i)
        ASSERT_EQ(std::bit_cast<uint32_t>(one[i]), std::bit_cast<uint32_t>(all[b * size + i]))
            << f->name << " " << b << " " << i;
    }
  }
  EXPECT_EQ(read, 11);
  EXPECT_EQ(readable_ggml_types(),
            "f32, f16, bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K");
  EXPECT_EQ(ggml_format(kQ2K)->widen, nullptr);
}

TEST(GgmlTypes, rows_of_interleaved_heads) {
  // Two heads of four rows, one number each; the file has rows 0 2 1 3 of either.
  const float stored[] = {0, 2, 1, 3, 4, 6, 5, 7};
  const StoredMatrix m{reinterpret_cast<const std::byte*>(stored), DType::f32, 8, 1, 4};
  for (int64_t i = 0; i < 8; ++i) {
    float x;
    m.row(i, &x);
    EXPECT_EQ(x, static_cast<float>(i));
  }
}

}  // namespace
}  // namespace bicache
