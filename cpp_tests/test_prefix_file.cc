// Saving a prefix store and having it again; and every way in which a file can be wrong. What can
// go wrong while it is saved: test_prefix_save.cc.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <functional>

#include "base/check.h"
#include "cache/prefix_file.h"
#include "fuzz/fuzz_targets.h"
#include "prefix_image.h"
#include "temp_files.h"

namespace bicache {
namespace {

using namespace std::string_literals;
using Source = EntryNeeds::Source;

DType other(DType dtype) { return dtype == DType::f32 ? DType::bf16 : DType::f32; }

StoreShape shape_of(EntryTypes types) { return {4, 2, 3, types, "tiny model, seed 1"}; }

// The message of the refusal, which names the path and leaves the store alone.
template <class E = std::invalid_argument>
std::string refusal(const StoreShape& shape, const std::string& path) {
  PrefixStore store(kBudget);
  add(store, shape, {7}, "mine", {Source::alone, 1, {}});
  const std::string before = content(store, shape);
  const std::string message = error_of<E>([&] { restore_prefixes(store, shape, path); });
  EXPECT_TRUE(contains(message, "[" + path));
  EXPECT_EQ(content(store, shape), before);
  EXPECT_EQ(store.stats().refused + store.stats().evictions, 0);
  return message;
}

class PrefixFile : public testing::TestWithParam<EntryTypes> {
 protected:
  PrefixFile() { fill(store_, shape_); }

  std::string saved() const {
    save_prefixes(store_, shape_, path_);
    return read_file(path_);
  }
  // The refusal of these bytes.
  std::string refused(const std::string& bytes) const {
    return refusal(shape_, fuzz::MemoryFile(bytes).path());
  }
  // The refusal of a file with this edit and right checksums.
  std::string edited(const std::function<void(PrefixImage&)>& edit) const {
    PrefixImage image(shape_, store_.items());
    edit(image);
    return refused(image.bytes());
  }

  const TempFolder folder_;
  const std::string path_ = folder_.at("prefixes");
  const StoreShape shape_ = shape_of(GetParam());
  PrefixStore store_{kBudget};
};

INSTANTIATE_TEST_SUITE_P(, PrefixFile,
                         testing::Values(EntryTypes{DType::f32, DType::f32},
                                         EntryTypes{DType::bf16, DType::bf16},
                                         EntryTypes{DType::bf16, DType::f32}),
                         [](const auto& info) {
                           return cat(name(info.param.kv), "_", name(info.param.residual));
                         });

TEST_P(PrefixFile, round_trip) {
  add(store_, shape_, {1, 2}, "salt", {Source::first_request, 2, {2}});
  add(store_, shape_, {1, 2}, "other\0 salt"s, {Source::alone, 0, {1, 2, 3}});
  add(store_, shape_, {1, 2, 3}, "salt", {Source::alone, 0, {}});
  add(store_, shape_, Ids(5000, 5), "", {Source::alone, 4, {3}});
  const std::string bytes = saved();
  EXPECT_EQ(save_prefixes(store_, shape_, path_), 6);
  EXPECT_EQ(bytes, content(store_, shape_));  // the format's table
  PrefixStore another(kBudget);
  const Restored restored = restore_prefixes(another, shape_, path_);
  EXPECT_EQ(restored.entries, 6);
  EXPECT_EQ(restored.kept, 6);
  EXPECT_EQ(content(another, shape_), bytes);
  EXPECT_EQ(another.stats().size_bytes, store_.stats().size_bytes);
  EXPECT_EQ(another.stats().hits + another.stats().misses, 0);
  const EntryNeeds needs{Source::first_request, 2, {2}};
  EXPECT_NE(another.find({Ids{1, 2}, Source::first_request, "salt"}, needs), nullptr);
  EXPECT_EQ(another.find({Ids{1, 2}, Source::alone, "salt"}, needs), nullptr);
}

// Fields of more than 1 MiB are summed piece by piece.
TEST_P(PrefixFile, round_trip_of_large_entries) {
  const StoreShape wide = {2, 100, 300, GetParam(), ""};
  PrefixStore store(kBudget), another(kBudget);
  add(store, wide, Ids(3000, 1), std::string(3 << 20, 's'), {Source::alone, 2, {1}});
  add(store, wide, Ids(300'000, 1), "", {Source::alone, 0, {}});
  EXPECT_EQ(save_prefixes(store, wide, path_), 2);
  EXPECT_EQ(restore_prefixes(another, wide, path_).kept, 2);
  EXPECT_TRUE(content(another, wide) == read_file(path_));
}

TEST_P(PrefixFile, empty_store) {
  store_.clear();
  EXPECT_EQ(save_prefixes(store_, shape_, path_), 0);
  PrefixStore another(kBudget);
  const Restored restored = restore_prefixes(another, shape_, path_);
  EXPECT_EQ(restored.entries, 0);
  EXPECT_EQ(restored.kept, 0);
  EXPECT_EQ(another.stats().entries, 0);
}

TEST_P(PrefixFile, a_smaller_budget_keeps_the_newest) {
  const EntryNeeds one{Source::alone, 1, {}};
  PrefixStore store(kBudget);
  for (const int32_t id : {1, 2, 3}) add(store, shape_, {id}, "", one);
  const int64_t each = store.stats().size_bytes / 3;
  EXPECT_NE(store.find({Ids{1}, Source::alone, ""}, one), nullptr);  // the order is now 2, 3, 1
  add(store, shape_, Ids(100, 9), "", one);  // alone larger than the budgets below
  EXPECT_NE(store.find({Ids{3}, Source::alone, ""}, one), nullptr);  // 2, 1, 9, 3
  save_prefixes(store, shape_, path_);
  const auto ids_kept = [&](int64_t budget_bytes) {
    PrefixStore small(budget_bytes);
    const Restored restored = restore_prefixes(small, shape_, path_);
    EXPECT_EQ(restored.entries, 4);
    EXPECT_EQ(restored.kept, small.stats().entries);
    EXPECT_EQ(small.stats().evictions + small.stats().refused, 0);  // what is too much never enters
    Ids ids;
    for (const auto& item : small.items()) ids.push_back(item.tokens[0]);
    return ids;
  };
  EXPECT_EQ(ids_kept(3 * each), (Ids{2, 1, 3}));
  EXPECT_EQ(ids_kept(3 * each - 1), (Ids{1, 3}));
  EXPECT_EQ(ids_kept(each), (Ids{3}));
  EXPECT_EQ(ids_kept(each - 1), (Ids{}));
  EXPECT_EQ(ids_kept(0), (Ids{}));
}

TEST_P(PrefixFile, restores_beside_what_is_there) {
  saved();
  PrefixStore another(kBudget);
  add(another, shape_, {5}, "", {Source::alone, 1, {}});
  add(another, shape_, {1, 2}, "salt", {Source::alone, 0, {1}});            // less than the file's
  add(another, shape_, {2147483647}, "", {Source::first_request, 4, {2}});  // more
  const Restored restored = restore_prefixes(another, shape_, path_);
  EXPECT_EQ(restored.entries, 2);
  EXPECT_EQ(restored.kept, 2);
  EXPECT_EQ(another.stats().entries, 3);
  EXPECT_NE(another.find({Ids{1, 2}, Source::alone, "salt"}, {Source::alone, 1, {1, 3}}), nullptr);
  EXPECT_NE(another.find({Ids{2147483647}, Source::first_request, ""}, {Source::alone, 4, {2}}),
            nullptr);
}

TEST_P(PrefixFile, counts_what_is_kept_in_full) {
  saved();
  PrefixStore narrow(kBudget);
  add(narrow, shape_, {1, 2}, "salt", {Source::alone, 1, {1}});
  PrefixStore another(narrow.stats().size_bytes);
  add(another, shape_, {1, 2}, "salt", {Source::alone, 1, {1}});
  const auto held = another.find({Ids{1, 2}, Source::alone, "salt"}, {Source::alone, 1, {}});
  EXPECT_EQ(restore_prefixes(another, shape_, path_).kept, 0);
  EXPECT_EQ(another.stats().entries, 1);
}

// What the store cannot give up leaves no room.
TEST_P(PrefixFile, what_requests_hold_stays) {
  saved();
  PrefixStore another(store_.stats().size_bytes);
  const EntryNeeds all{Source::alone, 4, {}};
  add(another, shape_, {5}, "", all);
  const auto held = another.find({Ids{5}, Source::alone, ""}, all);
  const Restored restored = restore_prefixes(another, shape_, path_);
  EXPECT_EQ(restored.kept, 1);
  EXPECT_EQ(another.items()[0].entry, held);
  EXPECT_EQ(another.items()[1].tokens, (Ids{2147483647}));  // the newer of the two
}

TEST_P(PrefixFile, every_flipped_bit_is_found) {
  const std::string good = saved();
  for (size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      refused(bad);
      ASSERT_FALSE(HasFailure()) << "bit " << bit << " of byte " << i;
    }
  }
}

TEST_P(PrefixFile, every_missing_or_extra_byte_is_found) {
  const std::string good = saved();
  for (size_t i = 0; i < good.size(); ++i) {
    refused(good.substr(0, i));
    refused(good.substr(0, i) + good.substr(i + 1));
    refused(good.substr(0, i) + '\0' + good.substr(i));
    ASSERT_FALSE(HasFailure()) << "byte " << i;
  }
  EXPECT_TRUE(contains(refused(good + "abc"),
                       "] end of the file: expected it after the last entry, got 3 more bytes"));
  EXPECT_TRUE(contains(refused(good + good), "more bytes"));
}

TEST_P(PrefixFile, damage_is_said_to_be_where_it_is) {
  std::string bytes = saved();
  const size_t last = bytes.size() - 9;  // of K and V of the second entry
  bytes[last] = static_cast<char>(bytes[last] ^ 1);
  PrefixImage first(shape_, store_.items());
  first.entries.pop_back();
  EXPECT_TRUE(contains(refused(bytes), cat("] entry 2 of 2 (from byte ", first.bytes().size(),
                                           ") checksum: expected ")));
  EXPECT_TRUE(contains(refused(bytes), "(the file is damaged)"));
  EXPECT_TRUE(contains(refused(bytes.substr(0, last)), "got the last "));
  bytes[50] = static_cast<char>(bytes[50] ^ 1);
  EXPECT_TRUE(contains(refused(bytes), "] header checksum: expected "));
}

TEST_P(PrefixFile, entries_cannot_change_places) {
  const PrefixImage image(shape_, store_.items());
  PrefixImage none = image, first = image;
  none.entries.clear();
  first.entries.pop_back();
  const std::string all = image.bytes();
  const size_t a = none.bytes().size(), b = first.bytes().size();
  const std::string head = all.substr(0, a), one = all.substr(a, b - a), two = all.substr(b);
  EXPECT_EQ(head + one + two, all);
  EXPECT_TRUE(contains(refused(head + two + one), "checksum"));
  EXPECT_TRUE(contains(refused(head + one + one), "checksum"));
}

TEST_P(PrefixFile, files_of_something_else) {
  EXPECT_TRUE(contains(edited([](auto& f) { f.magic = "PK\3\4zip\n"; }),
                       "] header magic: expected a bicache prefix file, which begins with "
                       "\"bcprefix\", got \"PK"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.version = 1; }), "] header version: expected 2, "));
  EXPECT_TRUE(contains(edited([](auto& f) { f.version = 3; }), ", got 3"));
  EXPECT_TRUE(
      contains(edited([](auto& f) { f.layers = 5; }), "] header layers: expected 4, got 5"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.layers = 4u << 30; }), "] header layers: expected"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.kv_width = 4; }), "kv_width: expected 2, got 4"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.dim = ~0ull; }), "dim: expected 3, got 18446744073"));
  EXPECT_TRUE(
      contains(edited([](auto& f) { f.kv_dtype ^= 1; }), "] header dtype of K and V: expected "));
  EXPECT_TRUE(contains(edited([](auto& f) { f.residual_dtype ^= 1; }),
                       "] header residual dtype: expected "));
  EXPECT_TRUE(contains(edited([](auto& f) { f.kv_dtype = 2; }),
                       "dtype of K and V: expected 0 (f32) or 1 (bf16), got 2"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.residual_dtype = ~0u; }),
                       "residual dtype: expected 0 (f32) or 1 (bf16), got 4294967295"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.fingerprint.back() = '2'; }),
                       "] header fingerprint: expected the prefixes of model \"tiny model, seed "
                       "1\", got those of \"tiny model, seed 2\""));
  saved();
  const auto [kv, residual] = GetParam();
  EXPECT_TRUE(contains(refusal(shape_of({other(kv), residual}), path_),
                       cat("dtype of K and V: expected ", name(other(kv)), ", got ", name(kv))));
  EXPECT_TRUE(
      contains(refusal(shape_of({kv, other(residual)}), path_),
               cat("residual dtype: expected ", name(other(residual)), ", got ", name(residual))));
}

TEST_P(PrefixFile, long_fingerprints_are_shown_where_they_differ) {
  StoreShape ours = shape_;
  ours.fingerprint = std::string(1000, 'a') + " ours";
  PrefixImage image(shape_, {});
  image.fingerprint = std::string(1000, 'a') + " theirs";
  image.fingerprint_bytes = 1007;
  const std::string message = refusal(ours, folder_.write("f", image.bytes()));
  EXPECT_TRUE(contains(message, "a ours\", got those of ...\"aaa"));
  EXPECT_TRUE(contains(message, "a theirs\""));
  ours.fingerprint = std::string(65536, 'a');
  EXPECT_EQ(save_prefixes(store_, ours, path_), 2);
  EXPECT_EQ(restore_prefixes(store_, ours, path_).kept, 2);
  ours.fingerprint += 'a';
  EXPECT_THROW(save_prefixes(store_, ours, path_), std::invalid_argument);
}

TEST_P(PrefixFile, entries_that_break_a_rule) {
  const auto first = [&](auto&& edit) {
    const std::string message = edited([&](PrefixImage& f) { edit(f.entries[0]); });
    EXPECT_TRUE(contains(message, ": expected "));
    EXPECT_TRUE(contains(message, "entry 1 of 2 (from byte 78)"));
    return message;
  };
  EXPECT_TRUE(contains(first([](auto& e) { e.tokens = 0; }), "tokens: expected at least 1, got 0"));
  EXPECT_TRUE(contains(first([](auto& e) { e.ids[1] = -1; }), "token ids: expected none below 0"));
  EXPECT_TRUE(contains(first([](auto& e) { e.source = 2; }), "source: expected 0 (alone) or 1 "));
  EXPECT_TRUE(contains(first([](auto& e) { e.kv_layers = 5; }), "kv_layers: expected at most 4"));
  EXPECT_TRUE(
      contains(first([](auto& e) { e.joins = 4; }), "joins: expected fewer than the model"));
  for (const auto& [joins, got] : {std::pair{std::vector<uint32_t>{0, 3}, "got 0"},
                                   {{1, 4}, "got 4 after 1"},
                                   {{3, 1}, "got 1 after 3"},
                                   {{2, 2}, "got 2 after 2"},
                                   {{1, 0xffffffff}, "got 4294967295 after 1"}}) {
    const std::string message = first([&](auto& e) { e.join_layers = joins; });
    EXPECT_TRUE(contains(message, "join layers: expected ascending ones in 1..3, "s + got));
  }
  EXPECT_TRUE(contains(edited([](auto& f) { f.entries[1] = f.entries[0]; }),
                       "key: expected each source, salt and token ids once, got them again"));
  // The same ids under another salt or source are another entry.
  PrefixImage fine(shape_, store_.items());
  fine.entries[1] = fine.entries[0];
  fine.entries[1].source = 1;
  fine.entries.push_back(fine.entries[0]);
  fine.entries[2].salt = "tlas";
  fine.count = 3;
  PrefixStore store(kBudget);
  EXPECT_EQ(restore_prefixes(store, shape_, folder_.write("f", fine.bytes())).kept, 3);
}

// With right checksums, so that nothing but the checks of sizes stands in the way.
TEST_P(PrefixFile, sizes_beyond_the_file) {
  EXPECT_TRUE(contains(edited([](auto& f) { f.count = 3; }), "] entry 3 of 3"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.count = ~0ull; }), "] header entries: expected at "));
  EXPECT_TRUE(contains(edited([](auto& f) { f.fingerprint_bytes = 65537; }), "at most 65536"));
  EXPECT_TRUE(contains(edited([](auto& f) { f.fingerprint_bytes = 65536; }),
                       "] header fingerprint: expected at most the "));
  for (const uint64_t many : {1000ull, 1ull << 32, 1ull << 61, 1ull << 62, 1ull << 63, ~0ull}) {
    EXPECT_TRUE(contains(edited([&](auto& f) { f.entries[0].tokens = many; }),
                         "token ids: expected at most the "));
    EXPECT_TRUE(contains(edited([&](auto& f) { f.entries[0].salt_bytes = many; }),
                         "salt: expected at most the "));
  }
  const std::string message = edited([](auto& f) {
    f.entries[1].ids.resize(1000);
    f.entries[1].tokens = 1000;
  });
  EXPECT_TRUE(contains(message, cat("K, V and residuals: expected ",
                                    1000 * 4 * 2 * 2 * size_bytes(GetParam().kv), " bytes")));
  // A model so large that the product of sizes has no 64 bits.
  StoreShape vast = shape_;
  vast.kv_width = int64_t{1} << 62;
  const std::string path = folder_.write("f", PrefixImage(vast, store_.items()).bytes());
  PrefixStore empty(kBudget);
  EXPECT_TRUE(
      contains(error_of<std::invalid_argument>([&] { restore_prefixes(empty, vast, path); }),
               "entry 1 of 2 (from byte 78) K, V and residuals] size overflow"));
  // One that no memory holds.
  vast.kv_width = int64_t{1} << 50;
  folder_.write("f", PrefixImage(vast, store_.items()).bytes());
  EXPECT_TRUE(
      contains(error_of<std::invalid_argument>([&] { restore_prefixes(empty, vast, path); }),
               "K, V and residuals: expected "));
}

TEST_P(PrefixFile, only_entries_of_the_shape_are_saved) {
  saved();
  const std::string before = read_file(path_);
  for (const auto& edit : std::vector<std::function<void(StoreShape&)>>{
           [](auto& s) { s.layers = 3; }, [](auto& s) { s.kv_width = 3; },
           [](auto& s) { s.dim = 2; }, [](auto& s) { s.types.kv = other(s.types.kv); },
           [](auto& s) { s.types.residual = other(s.types.residual); }}) {
    StoreShape wrong = shape_;
    edit(wrong);
    EXPECT_THROW(save_prefixes(store_, wrong, path_), std::logic_error);
  }
  PrefixStore joins(kBudget);
  add(joins, shape_, {1}, "", {Source::alone, 0, {3}});
  StoreShape shallow = shape_;
  shallow.layers = 3;
  EXPECT_THROW(save_prefixes(joins, shallow, path_), std::logic_error);
  EXPECT_EQ(read_file(path_), before);
}

TEST(PrefixFiles, what_cannot_be_read) {
  const TempFolder folder;
  const StoreShape shape = shape_of({});
  ASSERT_EQ(::mkfifo(folder.at("fifo").c_str(), 0600), 0);
  EXPECT_TRUE(contains(refusal<FileError>(shape, folder.at("none")), "cannot open: "));
  EXPECT_TRUE(contains(refusal(shape, folder.path()), "expected a regular file, got a folder"));
  EXPECT_TRUE(contains(refusal(shape, folder.at("fifo")), "expected a regular file, got a FIFO"));
  EXPECT_TRUE(contains(refusal(shape, "/dev/zero"), "expected a regular file, got a FIFO"));
  EXPECT_TRUE(
      contains(refusal(shape, folder.write("empty", "")), "header magic: expected 8 bytes"));
  // Its size is said to be a page, and it has fewer bytes: as if truncated while it is read.
  const char* shrunk = "/sys/devices/system/cpu/online";
  if (!std::filesystem::exists(shrunk)) GTEST_SKIP() << "no " << shrunk;
  EXPECT_TRUE(contains(refusal(shape, shrunk), "bytes, as when it was opened, got fewer"));
}

}  // namespace
}  // namespace bicache
