// The strict JSON reader: values, errors with their places, limits.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "base/check.h"
#include "files/json.h"
#include "temp_files.h"

namespace bicache {
namespace {

using namespace std::string_literals;

Json parse(const std::string& text) { return Json::parse(text, "src"); }

std::string nested(int depth, char open, char close) {
  return std::string(depth, open) + std::string(depth, close);
}

struct BadJson {
  const char* name;
  std::string text;
  std::string expected;  // part of the message
};
void PrintTo(const BadJson& c, std::ostream* out) { *out << c.name; }

class JsonErrors : public testing::TestWithParam<BadJson> {};

TEST_P(JsonErrors, names_the_rule_and_the_place) {
  const std::string message =
      error_of<std::invalid_argument>([] { Json::parse(GetParam().text, "src"); });
  EXPECT_TRUE(message.starts_with("[src] JSON: expected ")) << message;
  EXPECT_TRUE(contains(message, GetParam().expected));
}

const BadJson kBadJson[] = {
    {"empty", "", "a value, got the end of the text at byte 0"},
    {"only_space", " \n", "a value, got the end of the text at byte 2"},
    {"byte_order_mark", "\xEF\xBB\xBF{}", "a value, got byte 0xef at byte 0"},
    {"form_feed", "\f1", "a value, got byte 0x0c at byte 0"},
    {"trailing_text", "{} x", "the end of the text, got 'x' at byte 3"},
    {"two_documents", "1 2", "the end of the text, got '2' at byte 2"},
    {"trailing_nul", "{}\0"s, "the end of the text, got byte 0x00 at byte 2"},
    {"comment", "/* */1", "a value, got '/'"},
    {"word", "nul", "a value, got 'n'"},
    {"long_word", "nulll", "the end of the text, got 'l' at byte 4"},
    {"capital_word", "True", "a value, got 'T'"},
    {"nan", "NaN", "a value, got 'N'"},
    {"infinity", "[Infinity]", "a value, got 'I' at byte 1"},
    {"minus_infinity", "-Infinity", "a digit, got 'I' at byte 1"},
    {"plus", "+1", "a value, got '+'"},
    {"minus", "-", "a digit, got the end of the text"},
    {"leading_zero", "01", "no leading zeros, got some at byte 0"},
    {"minus_leading_zero", "-00", "no leading zeros, got some at byte 0"},
    {"hexadecimal", "0x10", "the end of the text, got 'x'"},
    {"no_integer_part", ".5", "a value, got '.'"},
    {"no_fraction", "1.", "a digit, got the end of the text at byte 2"},
    {"no_exponent", "1e", "a digit, got the end of the text"},
    {"no_exponent_digits", "1e+", "a digit, got the end of the text"},
    {"two_signs", "1e+-5", "a digit, got '-'"},
    {"overflow", "[1e999]", "a number that a double holds, got \"1e999\" at byte 1"},
    {"negative_overflow", "-1e999", "a number that a double holds"},
    {"overflow_in_digits", std::string(400, '9'), "a number that a double holds"},
    {"underflow", "1e-999", "a number that a double holds"},
    {"open_array", "[1", "',' or ']', got the end of the text at byte 2"},
    {"array_trailing_comma", "[1,]", "a value, got ']' at byte 3"},
    {"array_only_comma", "[,]", "a value, got ','"},
    {"array_no_comma", "[1 2]", "',' or ']', got '2'"},
    {"array_wrong_close", "[1}", "',' or ']', got '}'"},
    {"open_object", "{\"a\":1", "',' or '}', got the end of the text"},
    {"object_trailing_comma", "{\"a\":1,}", "a key in quotes, got '}'"},
    {"object_bare_key", "{a:1}", "a key in quotes, got 'a'"},
    {"object_single_quotes", "{'a':1}", "a key in quotes, got '''"},
    {"object_number_key", "{1:1}", "a key in quotes, got '1'"},
    {"object_no_colon", "{\"a\" 1}", "':', got '1' at byte 5"},
    {"object_no_value", "{\"a\":}", "a value, got '}'"},
    {"object_no_comma", "{\"a\":1 \"b\":2}", "',' or '}', got '\"'"},
    {"duplicate_key", R"({"a":1,"b":2,"a":1})", "unique keys, got \"a\" again at byte 13"},
    {"duplicate_key_escaped", R"({"a":1,"\u0061":2})", "unique keys, got \"a\" again at byte 7"},
    {"duplicate_key_inside", R"({"x":[{"":1,"":2}]})", "unique keys, got \"\" again"},
    {"open_string", "[\"abc", "a string that ends, got one that does not at byte 1"},
    {"open_escape", "\"\\", "behind a backslash, got the end of the text"},
    {"open_string_after_escape", "\"\\\"", "a string that ends"},
    {"unknown_escape", "\"\\x41\"", "behind a backslash, got 'x' at byte 2"},
    {"capital_u", "\"\\U0041\"", "behind a backslash, got 'U'"},
    {"short_hex", "\"\\u12\"", "4 hexadecimal digits, got '\"'"},
    {"bad_hex", "\"\\u12g4\"", "4 hexadecimal digits, got 'g'"},
    {"signed_hex", "\"\\u+123\"", "4 hexadecimal digits, got '+'"},
    {"end_in_hex", "\"\\u00", "4 hexadecimal digits, got the end of the text"},
    {"newline_in_string", "\"a\nb\"", "control characters to be escaped, got byte 0x0a at byte 2"},
    {"nul_in_string", "\"a\0b\""s, "control characters to be escaped, got byte 0x00"},
    {"unit_separator_in_string", "\"\x1F\"", "to be escaped, got byte 0x1f"},
    {"tab_in_key", "{\"\t\":1}", "control characters to be escaped, got byte 0x09"},
    {"lone_high", R"("\ud800")", "surrogates in pairs, got a lone one at byte 1"},
    {"lone_low", R"("a\udc00")", "surrogates in pairs, got a lone one at byte 2"},
    {"high_and_letter", R"("\ud800a")", "surrogates in pairs"},
    {"high_and_escape", R"("\ud800\n")", "surrogates in pairs"},
    {"high_and_no_low", R"("\ud800\u0041")", "surrogates in pairs"},
    {"two_high", R"("\ud800\ud800")", "surrogates in pairs"},
    {"utf8_lone_continuation", "\"\x80\"", "UTF-8, got byte 0x80 at byte 1"},
    {"utf8_cut", "\"\xC3\"", "UTF-8, got byte 0xc3"},
    {"utf8_cut_by_end", "\"\xE2\x82", "UTF-8, got byte 0xe2"},
    {"utf8_overlong_2", "\"\xC0\xAF\"", "UTF-8, got byte 0xc0"},
    {"utf8_overlong_3", "\"\xE0\x80\xAF\"", "UTF-8, got byte 0xe0"},
    {"utf8_overlong_4", "\"\xF0\x80\x80\xAF\"", "UTF-8, got byte 0xf0"},
    {"utf8_surrogate", "\"\xED\xA0\x80\"", "UTF-8, got byte 0xed"},
    {"utf8_too_large", "\"\xF4\x90\x80\x80\"", "UTF-8, got byte 0xf4"},
    {"utf8_f5", "\"\xF5\x80\x80\x80\"", "UTF-8, got byte 0xf5"},
    {"utf8_bad_third", "\"\xE2\x82\x41\"", "UTF-8, got byte 0xe2"},
    {"deep_array", nested(65, '[', ']'), "nesting of at most 64 levels, got more at byte 64"},
    {"deep_unclosed", std::string(100000, '['), "nesting of at most 64 levels"},
};

INSTANTIATE_TEST_SUITE_P(All, JsonErrors, testing::ValuesIn(kBadJson),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Json, reads_every_kind) {
  const Json json = parse(
      " {\"n\" : null,\"t\":true , \"f\":false,\"i\":-12,\"d\":2.5,\n\t\"s\":\"x\","
      "\"a\":[1,\"2\",[]],\"o\":{\"k\":{}}}\r\n");
  EXPECT_TRUE(json.find("n")->is_null());
  EXPECT_TRUE(json.find("t")->boolean("w"));
  EXPECT_FALSE(json.find("f")->boolean("w"));
  EXPECT_EQ(json.find("i")->integer("w"), -12);
  EXPECT_EQ(json.find("i")->number("w"), -12.0);
  EXPECT_EQ(json.find("d")->number("w"), 2.5);
  EXPECT_EQ(json.find("s")->string("w"), "x");
  const Json::Array& items = json.find("a")->array("w");
  ASSERT_EQ(items.size(), 3u);
  EXPECT_EQ(items[0].integer("w"), 1);
  EXPECT_EQ(items[1].string("w"), "2");
  EXPECT_TRUE(items[2].array("w").empty());
  EXPECT_TRUE(json.find("o")->find("k")->object("w").empty());
}

TEST(Json, keeps_the_order_of_members) {
  const Json json = parse(R"({"b":1,"a":2,"c":3})");
  std::string keys;
  for (const auto& [key, value] : json.object("w")) keys += key;
  EXPECT_EQ(keys, "bac");
}

TEST(Json, find_is_null_where_there_is_nothing) {
  const Json json = parse(R"({"a":[1]})");
  EXPECT_EQ(json.find("b"), nullptr);
  EXPECT_EQ(json.find(""), nullptr);
  EXPECT_EQ(json.find("a")->find("a"), nullptr);
}

TEST(Json, integers_fit_64_bits_or_are_numbers) {
  using Limits = std::numeric_limits<int64_t>;
  EXPECT_EQ(parse("9223372036854775807").integer("w"), Limits::max());
  EXPECT_EQ(parse("-9223372036854775808").integer("w"), Limits::min());
  EXPECT_EQ(parse("0").integer("w"), 0);
  for (const char* text : {"9223372036854775808", "-9223372036854775809", "1.0", "1e2", "1E0"}) {
    const Json json = parse(text);
    EXPECT_EQ(json.kind(), Json::Kind::number) << text;
    EXPECT_EQ(json.number("w"), std::stod(text)) << text;
    EXPECT_THROW(json.integer("w"), std::invalid_argument) << text;
  }
}

TEST(Json, minus_zero_keeps_its_sign) {
  for (const char* text : {"-0", "-0.0", "-0e5"}) {
    const Json json = parse(text);
    EXPECT_EQ(json.number("w"), 0.0) << text;
    EXPECT_TRUE(std::signbit(json.number("w"))) << text;
    EXPECT_THROW(json.integer("w"), std::invalid_argument) << text;
  }
}

TEST(Json, numbers_are_rounded_correctly) {
  for (const char* text : {"0.1", "1e-5", "1e+5", "1.5E3", "0e1", "0.0000001", "5e-324",
                           "1.7976931348623157e308", "2.2250738585072011e-308",
                           "123456789012345678901234567890", "-3.141592653589793238462643"}) {
    EXPECT_EQ(parse(text).number("w"), std::strtod(text, nullptr)) << text;
  }
}

TEST(Json, unescapes_strings) {
  EXPECT_EQ(parse(R"("\"\\\/\b\f\n\r\t")").string("w"), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(parse(R"("\u0041\u00e9\u20AC\uD83D\ude00")").string("w"),
            "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
  EXPECT_EQ(parse(R"("\uD800\uDC00\uDBFF\uDFFF")").string("w"), "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF");
  EXPECT_EQ(parse(R"("\ud7ff\ue000\uffff\u07ff\u0800\u007f\u0080")").string("w"),
            "\xED\x9F\xBF\xEE\x80\x80\xEF\xBF\xBF\xDF\xBF\xE0\xA0\x80\x7F\xC2\x80");
  EXPECT_EQ(parse(R"("a\u0000b")").string("w"), "a\0b"s);
}

TEST(Json, keeps_utf8_as_it_is) {
  // The first and last code points of each length, and the two beside the surrogates.
  const std::string text =
      "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xED\x9F\xBF\xEE\x80\x80\xEF\xBF\xBF"
      "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF";
  EXPECT_EQ(parse("\"" + text + "\"").string("w"), text);
}

TEST(Json, nests_64_deep) {
  const Json root = parse(nested(64, '[', ']'));
  int depth = 1;
  for (const Json* json = &root; !json->array("w").empty(); json = &json->array("w")[0]) ++depth;
  EXPECT_EQ(depth, 64);
  std::string objects;
  for (int i = 0; i < 63; ++i) objects += "{\"k\":";
  EXPECT_NO_THROW(parse(objects + "{}" + std::string(63, '}')));
  EXPECT_THROW(parse(objects + "{\"k\":[]}" + std::string(63, '}')), std::invalid_argument);
}

TEST(Json, siblings_do_not_count_as_depth) {
  std::string text = "[";
  for (int i = 0; i < 200; ++i) text += "[],{},";
  EXPECT_EQ(parse(text + "[]]").array("w").size(), 401u);
}

TEST(Json, limits_the_number_of_values) {
  std::string text = "[0";
  for (int64_t i = 1; i < Json::kMaxValues; ++i) text += ",0";  // with the array: one too many
  const std::string message = error_of<std::invalid_argument>([&] { parse(text + "]"); });
  EXPECT_TRUE(contains(message, "expected at most 4194304 values, got more"));
  text.resize(text.size() - 2);
  EXPECT_EQ(static_cast<int64_t>(parse(text + "]").array("w").size()), Json::kMaxValues - 1);
}

TEST(Json, many_keys_are_not_quadratic) {  // 10^5 keys, compared in pairs, would take minutes
  std::string text = "{";
  for (int i = 0; i < 100000; ++i) text += "\"k" + std::to_string(i) + "\":0,";
  EXPECT_EQ(parse(text + "\"last\":0}").object("w").size(), 100001u);
  EXPECT_THROW(parse(text + "\"k777\":0}"), std::invalid_argument);
}

TEST(Json, wrong_kinds_name_the_place_and_both_kinds) {
  const Json json = parse(R"([null,true,1,1.5,"s",[],{}])");
  const Json::Array& items = json.array("w");
  const char* kinds[] = {"null",     "a boolean", "an integer", "a number",
                         "a string", "an array",  "an object"};
  for (size_t i = 0; i < items.size(); ++i) {
    EXPECT_STREQ(items[i].kind_name(), kinds[i]);
    const auto check = [&](const char* expected, bool accepted, auto&& get) {
      if (accepted) {
        EXPECT_NO_THROW(get(items[i])) << kinds[i];
      } else {
        EXPECT_EQ(error_of<std::invalid_argument>([&] { get(items[i]); }),
                  cat("[file] field: expected ", expected, ", got ", kinds[i]));
      }
    };
    check("a boolean", i == 1, [](const Json& x) { x.boolean("file", "field"); });
    check("an integer", i == 2, [](const Json& x) { x.integer("file", "field"); });
    check("a number", i == 2 || i == 3, [](const Json& x) { x.number("file", "field"); });
    check("a string", i == 4, [](const Json& x) { x.string("file", "field"); });
    check("an array", i == 5, [](const Json& x) { x.array("file", "field"); });
    check("an object", i == 6, [](const Json& x) { x.object("file", "field"); });
  }
  EXPECT_EQ(error_of<std::invalid_argument>([&] { items[0].integer("file"); }),
            "[file] expected an integer, got null");
}

TEST(Json, messages_show_hostile_text_harmlessly) {
  EXPECT_EQ(printable("a\x1B[31m\n\x7F\xFF\xC3\xA9"), "a\\x1b[31m\\x0a\\x7f\\xff\xC3\xA9");
  EXPECT_EQ(printable(std::string(80, 'x')), std::string(80, 'x'));
  EXPECT_EQ(printable(std::string(81, 'x')), std::string(80, 'x') + "...");
  EXPECT_EQ(printable(std::string(79, 'x') + "\xC3\xA9"), std::string(79, 'x') + "...");
  EXPECT_EQ(quote(""), "\"\"");
}

}  // namespace
}  // namespace bicache
