// The strict safetensors reader: what it accepts, and hand-made files that break one rule each.
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "base/check.h"
#include "files/safetensors.h"
#include "temp_files.h"

namespace bicache {
namespace {

using namespace std::string_literals;

std::string text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A file with the header {`members`} and that many bytes of data.
std::string file(const std::string& members, size_t data_bytes) {
  return safetensors_bytes("{" + members + "}", test_bytes(data_bytes));
}

// A file with one F32 tensor, 8 bytes, of that shape and those offsets.
std::string one(const std::string& shape, const std::string& offsets) {
  return file(entry("a", "F32", shape, offsets), 8);
}

// {"a": {`members`}} and 8 bytes.
std::string fields(const std::string& members) { return file("\"a\":{" + members + "}", 8); }

struct BadFile {
  const char* name;
  std::string bytes;
  std::string expected;  // part of the message
};
void PrintTo(const BadFile& c, std::ostream* out) { *out << c.name; }

class SafeTensorsErrors : public testing::TestWithParam<BadFile> {};

TEST_P(SafeTensorsErrors, names_the_file_and_the_rule) {
  const TempFolder folder;
  const std::string path = folder.write("bad.safetensors", GetParam().bytes);
  const std::string message = error_of<std::invalid_argument>([&] { SafeTensors bad(path); });
  EXPECT_TRUE(message.starts_with("[" + path)) << message;
  EXPECT_TRUE(contains(message, GetParam().expected));
}

const std::string kTwo = "\"dtype\":\"F32\",\"shape\":[2]";
const std::string kAll = kTwo + ",\"data_offsets\":[0,8]";

const BadFile kBadFiles[] = {
    // The length and the frame of the header.
    {"empty", "", "header length: expected 8 bytes, got a file of 0"},
    {"seven_bytes", std::string(7, '\0'), "header length: expected 8 bytes, got a file of 7"},
    {"length_0", little_endian(0) + "{}", "expected more than 0 bytes, got 0"},
    {"length_beyond_the_file", little_endian(3) + "{}",
     "expected at most the 2 bytes that the file has behind it, got 3"},
    {"length_only", little_endian(2), "expected at most the 0 bytes"},
    {"length_above_the_limit", little_endian(100000001) + "{}",
     "expected at most 100000000 bytes, got 100000001"},
    {"length_2_63", little_endian(uint64_t{1} << 63) + "{}", "got 9223372036854775808"},
    {"length_2_64_minus_1", little_endian(~uint64_t{0}) + "{}", "got 18446744073709551615"},
    {"length_wraps_with_its_own_8", little_endian(~uint64_t{0} - 7) + "{}", "expected at most"},
    {"leading_space", safetensors_bytes(" {}", ""),
     "header: expected '{' as its first byte, got \" \""},
    {"array", safetensors_bytes("[]", ""), "header: expected '{' as its first byte, got \"[\""},
    {"not_json", safetensors_bytes("{hello}", ""), "header] JSON: expected a key in quotes"},
    {"not_json_at_all", safetensors_bytes("\x80\x02}q", ""), "first byte, got \"\\x80\""},
    {"cut_json", safetensors_bytes("{\"a\":{", ""), "got the end of the text"},
    {"text_behind_the_object", safetensors_bytes("{}{}", ""), "expected the end of the text"},
    {"nul_padding", safetensors_bytes("{}\0\0"s, ""),
     "expected the end of the text, got byte 0x00"},
    {"bad_utf8", safetensors_bytes("{\"\xFF\":1}", ""), "expected UTF-8, got byte 0xff"},
    {"lone_surrogate", safetensors_bytes(R"({"\ud800":1})", ""), "surrogates in pairs"},
    {"deep_nesting", safetensors_bytes("{\"a\":" + std::string(100000, '['), ""),
     "nesting of at most 64 levels"},
    // Fields.
    {"duplicate_tensor",
     file(entry("a", "F32", "[2]", "[0,8]") + "," + entry("a", "F32", "[2]", "[0,8]"), 8),
     "expected unique keys, got \"a\" again"},
    {"duplicate_metadata", file(R"("__metadata__":{},"__metadata__":{})", 0), "unique keys"},
    {"duplicate_metadata_key", file(R"("__metadata__":{"k":"1","k":"2"})", 0), "unique keys"},
    {"duplicate_field", fields(kAll + ",\"dtype\":\"F32\""), "unique keys, got \"dtype\" again"},
    {"extra_field", fields(kAll + ",\"stride\":[1]"),
     "tensor a: expected the fields dtype, shape and data_offsets, got \"stride\""},
    {"no_dtype", fields(R"("shape":[2],"data_offsets":[0,8])"),
     "expected the field dtype, got none"},
    {"no_shape", fields(R"("dtype":"F32","data_offsets":[0,8])"), "expected the field shape, got"},
    {"no_data_offsets", fields(kTwo), "tensor a: expected the field data_offsets, got none"},
    {"tensor_is_a_number", file("\"a\":1", 0), "tensor a: expected an object, got an integer"},
    {"tensor_is_null", file("\"a\":null", 0), "tensor a: expected an object, got null"},
    {"metadata_is_an_array", file("\"__metadata__\":[]", 0),
     "__metadata__: expected an object, got an array"},
    {"metadata_is_null", file("\"__metadata__\":null", 0), "__metadata__: expected an object"},
    {"metadata_value_is_a_number", file(R"("__metadata__":{"step":3})", 0),
     "__metadata__ step: expected a string, got an integer"},
    {"metadata_value_is_an_object", file(R"("__metadata__":{"x":{}})", 0),
     "expected a string, got an"},
    // Types.
    {"unknown_dtype", file(entry("a", "F31", "[2]", "[0,8]"), 8),
     "tensor a dtype: expected a type of the format (F32, BF16, F16, I64, ...), got \"F31\""},
    {"lower_case_dtype", file(entry("a", "f32", "[2]", "[0,8]"), 8), "tensor a dtype: expected"},
    {"empty_dtype", file(entry("a", "", "[2]", "[0,8]"), 8), "tensor a dtype: expected"},
    {"dtype_with_nul", file(entry("a", "F32\\u0000", "[2]", "[0,8]"), 8), "got \"F32\\x00\""},
    {"dtype_is_a_number", fields(R"("dtype":32,"shape":[2],"data_offsets":[0,8])"),
     "tensor a dtype: expected a string, got an integer"},
    {"half_a_byte", file(entry("a", "F4", "[3]", "[0,2]"), 2),
     "expected whole bytes of F4, got [3]"},
    // Shapes.
    {"shape_is_a_number", one("2", "[0,8]"), "tensor a shape: expected an array, got an integer"},
    {"shape_is_nested", one("[[2]]", "[0,8]"), "tensor a shape: expected an integer, got an array"},
    {"shape_is_negative", one("[-2]", "[0,8]"), "tensor a shape: expected 0 or more, got -2"},
    {"two_negative_sizes", one("[-1,-2]", "[0,8]"), "tensor a shape: expected 0 or more, got -1"},
    {"shape_is_a_fraction", one("[2.0]", "[0,8]"), "shape: expected an integer, got a number"},
    {"shape_is_minus_0", one("[-0]", "[0,0]"), "shape: expected an integer, got a number"},
    {"shape_is_a_boolean", one("[true,2]", "[0,8]"), "expected an integer, got a boolean"},
    {"shape_is_a_string", one("[\"2\"]", "[0,8]"), "expected an integer, got a string"},
    {"shape_above_2_63", one("[9223372036854775808]", "[0,8]"),
     "expected an integer, got a number"},
    {"shape_product_overflow", one("[4294967296,4294967296]", "[0,8]"),
     "tensor a shape] size overflow: "},
    // 2^62 + 1 elements of 4 bytes: 2^64 + 4, which wraps to the 4 bytes offered.
    {"product_wraps_to_the_right_size",
     file(entry("a", "F32", "[4611686018427387905]", "[0,4]"), 4),
     "tensor a shape] size overflow: "},
    {"product_wraps_to_0", one("[4294967296,4294967296,4294967296]", "[0,0]"), "size overflow"},
    {"element_bytes_overflow", one("[4611686018427387904]", "[0,8]"), "size overflow"},
    {"overflow_before_a_0", one("[4294967296,4294967296,0]", "[0,0]"), "size overflow"},
    {"too_few_bytes", one("[3]", "[0,8]"),
     "tensor a data_offsets: expected 12 bytes for F32 [3], got 8"},
    {"too_many_bytes", one("[1]", "[0,8]"), "expected 4 bytes for F32 [1], got 8"},
    {"bytes_for_a_zero_size", one("[2,0]", "[0,8]"), "expected 0 bytes for F32 [2, 0], got 8"},
    {"scalar_of_8_bytes", one("[]", "[0,8]"), "expected 4 bytes for F32 [], got 8"},
    {"shape_of_many_dimensions", one("[1,1,1,1,1,1,1,1,1]", "[0,8]"),
     "for F32 [1, 1, 1, 1, 1, 1, 1, 1, ...], got 8"},
    // Offsets.
    {"offsets_are_an_object", one("[2]", "{}"), "data_offsets: expected an array, got an object"},
    {"one_offset", one("[2]", "[8]"), "data_offsets: expected 2 numbers, got 1"},
    {"three_offsets", one("[2]", "[0,8,8]"), "data_offsets: expected 2 numbers, got 3"},
    {"begin_after_end", one("[2]", "[8,0]"), "data_offsets: expected begin <= end, got 8 > 0"},
    {"negative_begin", one("[2]", "[-8,0]"), "data_offsets: expected 0 or more, got -8"},
    {"negative_end", one("[2]", "[0,-8]"), "data_offsets: expected 0 or more, got -8"},
    {"offset_is_a_fraction", one("[2]", "[0,8.0]"), "data_offsets: expected an integer"},
    {"offset_above_2_63", one("[2]", "[0,18446744073709551616]"),
     "data_offsets: expected an integer"},
    {"end_far_away", one("[1152921504606846975]", "[0,4611686018427387900]"),
     "shape] size overflow"},
    {"begin_far_away", one("[2]", "[9223372036854775799,9223372036854775807]"),
     "expected an end within the 8 bytes of data"},
    {"truncated_data", file(entry("a", "F32", "[2]", "[0,8]"), 7),
     "tensor a data_offsets: expected an end within the 7 bytes of data (is the file truncated?), "
     "got 8"},
    {"no_data", file(entry("a", "F32", "[2]", "[0,8]"), 0), "within the 0 bytes of data"},
    {"trailing_data", file(entry("a", "F32", "[2]", "[0,8]"), 9),
     "data: expected 8 bytes, where the last tensor ends, got 9 (trailing bytes)"},
    {"data_without_tensors", file("", 1),
     "data: expected 0 bytes, where the last tensor ends, got 1"},
    {"gap_at_the_start", file(entry("a", "F32", "[1]", "[4,8]"), 8),
     "tensor a data_offsets: expected begin 0, where the tensor before it ends, got 4 (a gap)"},
    {"gap", file(entry("a", "F32", "[1]", "[0,4]") + "," + entry("b", "F32", "[1]", "[8,12]"), 12),
     "tensor b data_offsets: expected begin 4, where the tensor before it ends, got 8 (a gap)"},
    {"overlap",
     file(entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "F32", "[2]", "[4,12]"), 12),
     "tensor b data_offsets: expected begin 8, where the tensor before it ends, got 4 (an "
     "overlap)"},
    {"same_bytes_twice",
     file(entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "F32", "[2]", "[0,8]"), 8),
     "tensor b data_offsets: expected begin 8, where the tensor before it ends, got 0 (an "
     "overlap)"},
    {"one_inside_another",
     file(entry("a", "F32", "[3]", "[0,12]") + "," + entry("b", "F32", "[1]", "[4,8]"), 12),
     "tensor b data_offsets: expected begin 12"},
    {"zero_size_inside_another",
     file(entry("a", "F32", "[2]", "[0,8]") + "," + entry("z", "F32", "[0]", "[4,4]"), 8),
     "tensor z data_offsets: expected begin 8, where the tensor before it ends, got 4 (an "
     "overlap)"},
    {"zero_size_behind_a_gap",
     file(entry("a", "F32", "[1]", "[0,4]") + "," + entry("z", "F32", "[0]", "[8,8]"), 8),
     "tensor z data_offsets: expected begin 4, where the tensor before it ends, got 8 (a gap)"},
    {"zero_size_beyond_the_data", file(entry("z", "F32", "[0]", "[4,4]"), 0),
     "tensor z data_offsets: expected an end within the 0 bytes"},
    {"hostile_name", file(entry("\\u001b[2J", "F32", "[1]", "[0,8]"), 8),
     "tensor \\x1b[2J data_offsets"},
};

INSTANTIATE_TEST_SUITE_P(All, SafeTensorsErrors, testing::ValuesIn(kBadFiles),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(SafeTensors, reads_tensors_and_metadata) {
  const TempFolder folder;
  const std::string path = folder.write(
      "good", file(entry("b", "BF16", "[2,3]", "[0,12]") + R"(,"__metadata__":{"format":"pt"},)" +
                       entry("a", "F32", "[2]", "[12,20]") + "  \n",
                   20));
  const SafeTensors tensors(path);
  EXPECT_EQ(tensors.path(), path);
  EXPECT_EQ(tensors.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  ASSERT_EQ(tensors.tensors().size(), 2u);
  const TensorInfo &a = tensors.tensors().at("a"), &b = tensors.tensors().at("b");
  EXPECT_EQ(a.dtype, "F32");
  EXPECT_EQ(a.shape, std::vector<int64_t>({2}));
  EXPECT_EQ(b.dtype, "BF16");
  EXPECT_EQ(b.shape, std::vector<int64_t>({2, 3}));
  EXPECT_EQ(text(tensors.data(b)), test_bytes(20).substr(0, 12));
  EXPECT_EQ(text(tensors.data(a)), test_bytes(20).substr(12));
}

TEST(SafeTensors, accepts_space_behind_the_header) {  // the reference writer pads to 8 bytes
  const TempFolder folder;
  const SafeTensors tensors(folder.write("padded", safetensors_bytes("{}      ", "")));
  EXPECT_TRUE(tensors.tensors().empty());
  EXPECT_TRUE(tensors.metadata().empty());
}

TEST(SafeTensors, order_of_the_header_is_free) {
  const TempFolder folder;
  const SafeTensors tensors(folder.write(
      "unordered", file(entry("x", "U8", "[1]", "[2,3]") + "," + entry("y", "U8", "[1]", "[0,1]") +
                            "," + entry("w", "U8", "[1]", "[1,2]"),
                        3)));
  std::string data;
  for (const char* name : {"y", "w", "x"}) data += text(tensors.data(tensors.tensors().at(name)));
  EXPECT_EQ(data, test_bytes(3));
}

TEST(SafeTensors, zero_size_tensors_stand_at_any_boundary) {
  const TempFolder folder;
  const std::string zero = "[0,7]";
  const SafeTensors tensors(folder.write(
      "zeros",
      file(entry("a", "F32", "[1]", "[0,4]") + "," + entry("b", "F32", "[1]", "[4,8]") + "," +
               entry("z0", "F32", zero, "[0,0]") + "," + entry("z1", "F32", zero, "[4,4]") + "," +
               entry("z2", "F32", "[0]", "[4,4]") + "," + entry("z3", "F32", zero, "[8,8]"),
           8)));
  EXPECT_EQ(tensors.tensors().size(), 6u);
  for (const char* name : {"z0", "z1", "z2", "z3"}) {
    EXPECT_TRUE(tensors.data(tensors.tensors().at(name)).empty()) << name;
  }
}

TEST(SafeTensors, scalars_have_one_element) {
  const TempFolder folder;
  const SafeTensors tensors(folder.write("scalar", file(entry("a", "F64", "[]", "[0,8]"), 8)));
  EXPECT_TRUE(tensors.tensors().at("a").shape.empty());
  EXPECT_EQ(tensors.data(tensors.tensors().at("a")).size(), 8u);
}

TEST(SafeTensors, knows_the_size_of_every_type) {
  const std::pair<const char*, int> types[] = {
      {"BOOL", 64}, {"U8", 64},      {"I8", 64},      {"F8_E5M2", 64}, {"F8_E4M3", 64},
      {"I16", 128}, {"U16", 128},    {"F16", 128},    {"BF16", 128},   {"I32", 256},
      {"U32", 256}, {"F32", 256},    {"F64", 512},    {"I64", 512},    {"U64", 512},
      {"F4", 32},   {"F6_E2M3", 48}, {"F6_E3M2", 48}, {"F8_E8M0", 64}, {"C64", 512}};
  const TempFolder folder;
  for (const auto& [type, bytes] : types) {
    for (int wrong : {0, 1}) {
      const int end = bytes + wrong;
      const std::string path =
          folder.write(type, file(entry("a", type, "[4,16]", "[0," + std::to_string(end) + "]"),
                                  static_cast<size_t>(end)));
      if (wrong) {
        EXPECT_THROW(SafeTensors{path}, std::invalid_argument) << type;
      } else {
        EXPECT_NO_THROW(SafeTensors{path}) << type;
      }
    }
  }
}

TEST(SafeTensors, every_truncation_is_an_error) {
  const TempFolder folder;
  const std::string whole =
      file(entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "U8", "[3]", "[8,11]"), 11);
  EXPECT_NO_THROW(SafeTensors(folder.write("whole", whole)));
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(SafeTensors(folder.write("cut", whole.substr(0, size))), std::invalid_argument)
        << size;
  }
}

TEST(SafeTensors, missing_file_is_a_file_error) {
  const TempFolder folder;
  EXPECT_THROW(SafeTensors(folder.at("none")), FileError);
  EXPECT_THROW(SafeTensors(folder.path()), std::invalid_argument);
}

TEST(SafeTensors, data_survives_a_move) {
  const TempFolder folder;
  SafeTensors from(folder.write("f", file(entry("a", "U8", "[5]", "[0,5]"), 5)));
  const SafeTensors to(std::move(from));
  EXPECT_EQ(text(to.data(to.tensors().at("a"))), test_bytes(5));
}

TEST(SafeTensors, data_of_another_file_is_refused) {
  const TempFolder folder;
  const SafeTensors small(folder.write("f", file(entry("a", "U8", "[5]", "[0,5]"), 5)));
  TensorInfo foreign = small.tensors().at("a");
  foreign.end = 6;
  EXPECT_THROW(small.data(foreign), std::logic_error);
}

TEST(SafeTensors, notices_truncation_after_it_was_opened) {
  const TempFolder folder;
  const std::string path = folder.write("f", file(entry("a", "U8", "[5]", "[0,5]"), 5));
  const SafeTensors tensors(path);
  EXPECT_NO_THROW(tensors.check_size());
  ASSERT_EQ(::truncate(path.c_str(), 20), 0);
  EXPECT_THROW(tensors.check_size(), std::invalid_argument);
}

// The limit on the header counts, not only the one on the file: a sparse file is large for free.
TEST(SafeTensors, header_limit_holds_in_a_large_file) {
  const TempFolder folder;
  const std::string path = folder.write("large", little_endian(100000001) + "{}");
  ASSERT_EQ(::truncate(path.c_str(), 200000000), 0);
  EXPECT_TRUE(contains(error_of<std::invalid_argument>([&] { SafeTensors bad(path); }),
                       "expected at most 100000000 bytes, got 100000001"));
}

TEST(SafeTensors, shape_text_is_bounded) {
  EXPECT_EQ(shape_text(std::vector<int64_t>{}), "[]");
  EXPECT_EQ(shape_text(std::vector<int64_t>{2, 3}), "[2, 3]");
  EXPECT_EQ(shape_text(std::vector<int64_t>(8, 1)), "[1, 1, 1, 1, 1, 1, 1, 1]");
  EXPECT_EQ(shape_text(std::vector<int64_t>(9, 1)), "[1, 1, 1, 1, 1, 1, 1, 1, ...]");
}

}  // namespace
}  // namespace bicache
