// Model folders: one file, shards, and everything that can be wrong with them.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <sstream>
#include <string>

#include "base/check.h"
#include "files/checkpoint.h"
#include "temp_files.h"

namespace bicache {
namespace {

using namespace std::string_literals;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

std::string text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A safetensors file of F32 tensors, `names` separated by spaces, 4 bytes each.
std::string tensors(const std::string& names) {
  std::istringstream in(names);
  std::string header = "{", name;
  size_t bytes = 0;
  for (; in >> name; bytes += 4) {
    header += bytes > 0 ? "," : "";
    header += entry(name, "F32", "[1]", cat("[", bytes, ",", bytes + 4, "]"));
  }
  return safetensors_bytes(header + "}", test_bytes(bytes));
}

std::string index(const std::string& weight_map) { return "{\"weight_map\":{" + weight_map + "}}"; }

// A good folder of two shards: a, b in the first, c in the second.
void write_sharded(const TempFolder& folder) {
  folder.write("config.json", "{}");
  folder.write("m-1.safetensors", tensors("a b"));
  folder.write("m-2.safetensors", tensors("c"));
  folder.write(kIndex, R"({"metadata":{"total_size":12},"weight_map":{"c":"m-2.safetensors",)"
                       R"("a":"m-1.safetensors","b":"m-1.safetensors"}})");
}

TEST(Checkpoint, reads_one_file) {
  const TempFolder folder;
  folder.write("config.json", R"({"model_type":"llada"})");
  folder.write(kSingle, safetensors_bytes("{" + entry("w", "BF16", "[2,3]", "[4,16]") + "," +
                                              entry("b", "F32", "[1]", "[0,4]") + "}",
                                          test_bytes(16)));
  const Checkpoint checkpoint(folder.path());
  EXPECT_EQ(checkpoint.folder(), folder.path());
  EXPECT_EQ(checkpoint.config().find("model_type")->string("w"), "llada");
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"b", "w"}));
  EXPECT_TRUE(checkpoint.has("w"));
  EXPECT_FALSE(checkpoint.has("v"));
  EXPECT_EQ(checkpoint.size_bytes(), 16);
  const Tensor w = checkpoint.tensor("w", {2, 3}), b = checkpoint.tensor("b");
  EXPECT_EQ(w.name, "w");
  EXPECT_EQ(w.dtype, DType::bf16);
  EXPECT_EQ(w.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(text(w.bytes), test_bytes(16).substr(4));
  EXPECT_EQ(b.dtype, DType::f32);
  EXPECT_EQ(text(b.bytes), test_bytes(4));
  EXPECT_NO_THROW(checkpoint.check_size());
}

TEST(Checkpoint, reads_shards) {
  const TempFolder folder;
  write_sharded(folder);
  const Checkpoint checkpoint(folder.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(checkpoint.size_bytes(), 12);
  EXPECT_EQ(text(checkpoint.tensor("b", {1}).bytes), test_bytes(8).substr(4));
  EXPECT_EQ(text(checkpoint.tensor("c", {1}).bytes), test_bytes(4));
}

TEST(Checkpoint, one_file_wins_over_an_index) {
  const TempFolder folder;
  write_sharded(folder);
  folder.write(kSingle, tensors("single"));
  EXPECT_EQ(Checkpoint(folder.path()).names(), std::vector<std::string>{"single"});
  folder.write(kIndex, "not even JSON");
  EXPECT_NO_THROW(Checkpoint(folder.path()));
}

TEST(Checkpoint, pickles_beside_safetensors_are_ignored) {
  const TempFolder folder;
  write_sharded(folder);
  folder.write("pytorch_model.bin", "\x80\x02.");
  EXPECT_EQ(Checkpoint(folder.path()).names().size(), 3u);
}

TEST(Checkpoint, follows_links_as_a_hugging_face_cache_has_them) {
  const TempFolder folder;
  std::filesystem::create_directories(folder.at("blobs"));
  std::filesystem::create_directories(folder.at("snapshots/1"));
  folder.write("blobs/1", "{}");
  folder.write("blobs/2", tensors("a"));
  std::filesystem::create_symlink("../../blobs/1", folder.at("snapshots/1/config.json"));
  std::filesystem::create_symlink("../../blobs/2", folder.at("snapshots/1/model.safetensors"));
  EXPECT_TRUE(Checkpoint(folder.at("snapshots/1")).has("a"));
  EXPECT_TRUE(Checkpoint(folder.at("snapshots/1/")).has("a"));
}

TEST(Checkpoint, survives_a_move) {
  const TempFolder folder;
  write_sharded(folder);
  Checkpoint from(folder.path());
  const Tensor before = from.tensor("c");
  const Checkpoint to(std::move(from));
  EXPECT_EQ(to.tensor("c").bytes.data(), before.bytes.data());
}

TEST(Checkpoint, checks_tensors) {
  const TempFolder folder;
  folder.write("config.json", "{}");
  folder.write(kSingle, safetensors_bytes("{" + entry("h", "F16", "[2]", "[0,4]") + "," +
                                              entry("w", "F32", "[1,2]", "[4,12]") + "}",
                                          test_bytes(12)));
  const Checkpoint checkpoint(folder.path());
  const auto message = [&](const std::string& name, const std::vector<int64_t>& shape) {
    return error_of<std::invalid_argument>([&] { checkpoint.tensor(name, shape); });
  };
  const std::string where = "[" + folder.path() + "] tensor ";
  EXPECT_EQ(message("w", {2, 1}), where + "w: expected shape [2, 1], got [1, 2]");
  EXPECT_EQ(message("w", {2}), where + "w: expected shape [2], got [1, 2]");
  EXPECT_EQ(message("h", {2}), where + "h: expected type F32 or BF16, got F16");
  EXPECT_THROW(checkpoint.tensor("h"), std::invalid_argument);
  EXPECT_TRUE(contains(message("x", {}), where + "x: expected in the checkpoint, got nothing"));
}

TEST(Checkpoint, notices_truncation) {
  const TempFolder folder;
  write_sharded(folder);
  const Checkpoint checkpoint(folder.path());
  EXPECT_NO_THROW(checkpoint.check_size());
  ASSERT_EQ(::truncate(folder.at("m-2.safetensors").c_str(), 9), 0);
  EXPECT_TRUE(contains(error_of<std::invalid_argument>([&] { checkpoint.check_size(); }),
                       "m-2.safetensors] file size: expected"));
}

TEST(Checkpoint, folder_must_be_a_folder) {
  const TempFolder folder;
  const std::string file = folder.write("file", "");
  EXPECT_TRUE(contains(error_of<std::invalid_argument>([&] { Checkpoint bad(file); }),
                       "expected a folder with config.json and model.safetensors, or a .gguf file, "
                       "got another file"));
  EXPECT_TRUE(contains(
      error_of<std::invalid_argument>([&] { Checkpoint bad(folder.path() + "\0x"s); }), "NUL"));
  for (const std::string& path : {folder.at("none"), ""s}) {
    try {
      Checkpoint bad(path);
      ADD_FAILURE() << "expected an exception for \"" << path << "\"";
    } catch (const FileError& e) {
      EXPECT_EQ(e.code(), ENOENT);
      EXPECT_EQ(e.path(), path);
      EXPECT_TRUE(contains(e.what(), "[" + path + "] cannot open the model folder: "));
    }
  }
}

// A good sharded folder, with one thing changed.
struct BadFolder {
  const char* name;
  std::function<void(const TempFolder&)> change;
  std::string expected;  // part of the message
  bool is_file_error = false;
};
void PrintTo(const BadFolder& c, std::ostream* out) { *out << c.name; }

class CheckpointErrors : public testing::TestWithParam<BadFolder> {};

TEST_P(CheckpointErrors, name_the_file_and_the_rule) {
  const TempFolder folder;
  write_sharded(folder);
  ASSERT_NO_THROW(Checkpoint(folder.path()));
  GetParam().change(folder);
  const auto open = [&] { Checkpoint bad(folder.path()); };
  const std::string message =
      GetParam().is_file_error ? error_of<FileError>(open) : error_of<std::invalid_argument>(open);
  EXPECT_TRUE(message.starts_with("[" + folder.path())) << message;
  EXPECT_TRUE(contains(message, GetParam().expected));
}

using Change = std::function<void(const TempFolder&)>;

Change written(const std::string& name, const std::string& bytes) {
  return [=](const TempFolder& folder) { folder.write(name, bytes); };
}

Change removed(const std::string& name) {
  return [=](const TempFolder& folder) { std::filesystem::remove(folder.at(name)); };
}

Change resized(const std::string& name, off_t size) {
  return [=](const TempFolder& folder) { ASSERT_EQ(::truncate(folder.at(name).c_str(), size), 0); };
}

Change replaced_by_folder(const std::string& name) {
  return [=](const TempFolder& folder) {
    std::filesystem::remove(folder.at(name));
    std::filesystem::create_directory(folder.at(name));
  };
}

// The good index, with tensor a in `file`.
Change a_in(const std::string& file) {
  return written(kIndex,
                 index(R"("a":")" + file + R"(","b":"m-1.safetensors","c":"m-2.safetensors")"));
}

// No weights, but a file of that name.
Change only(const std::string& name) {
  return [=](const TempFolder& folder) {
    std::filesystem::remove(folder.at(kIndex));
    if (!name.empty()) folder.write(name, "x");
  };
}

const std::string kPlain =
    "weight_map a: expected the plain name of a .safetensors file of the folder, got ";

const BadFolder kBadFolders[] = {
    {"no_config", removed("config.json"), "/config.json] cannot open: ", true},
    {"config_is_a_folder", replaced_by_folder("config.json"),
     "/config.json] expected a regular file"},
    {"config_is_empty", written("config.json", ""), "/config.json] JSON: expected a value"},
    {"config_is_an_array", written("config.json", "[]"),
     "/config.json] expected an object, got an array"},
    {"config_has_duplicates", written("config.json", R"({"a":1,"a":2})"), "expected unique keys"},
    {"config_is_huge", resized("config.json", 67108865),
     "/config.json] file size: expected at most 67108864 bytes, got 67108865"},

    {"no_weights", only(""),
     "weights: expected model.safetensors or model.safetensors.index.json, got neither", true},
    {"only_a_pickle", only("pytorch_model.bin"),
     "got \"pytorch_model.bin\", a pickle; pickles can run code when they are read and are "
     "refused: "
     "convert the checkpoint to safetensors"},
    {"only_a_pt", only("model.pt"), "got \"model.pt\", a pickle"},
    {"only_a_pth", only("consolidated.00.pth"), "got \"consolidated.00.pth\", a pickle"},
    {"only_a_ckpt", only("model.ckpt"), "convert the checkpoint to safetensors"},

    {"single_is_bad", written(kSingle, "x"), "/model.safetensors] header length: expected 8 bytes"},
    {"single_is_a_folder",
     [](const TempFolder& folder) { std::filesystem::create_directory(folder.at(kSingle)); },
     "/model.safetensors] expected a regular file, got a folder"},
    {"single_is_a_fifo",
     [](const TempFolder& folder) { ASSERT_EQ(::mkfifo(folder.at(kSingle).c_str(), 0600), 0); },
     "/model.safetensors] expected a regular file, got a FIFO"},
    {"single_is_a_dangling_link",
     [](const TempFolder& folder) { std::filesystem::create_symlink("none", folder.at(kSingle)); },
     "/model.safetensors] cannot open: ", true},

    {"index_is_not_json", written(kIndex, "{"), "index.json] JSON: expected a key"},
    {"index_is_an_array", written(kIndex, "[]"), "index.json] expected an object, got an array"},
    {"index_is_huge", resized(kIndex, 67108865), "file size: expected at most 67108864 bytes"},
    {"index_without_map", written(kIndex, "{}"),
     "index.json] expected the field weight_map, got none"},
    {"map_is_an_array", written(kIndex, R"({"weight_map":[]})"),
     "weight_map: expected an object, got an array"},
    {"map_is_empty", written(kIndex, index("")),
     "weight_map: expected at least one tensor, got none"},
    {"map_value_is_a_number", written(kIndex, index("\"a\":1")),
     "weight_map a: expected a string, got an integer"},
    {"tensor_twice_in_the_map",
     written(kIndex, index(R"("a":"m-1.safetensors","a":"m-2.safetensors")")),
     "expected unique keys, got \"a\" again"},

    {"shard_absolute", a_in("/etc/m.safetensors"), kPlain + "\"/etc/m.safetensors\""},
    {"shard_above", a_in("../m-1.safetensors"), kPlain + "\"../m-1.safetensors\""},
    {"shard_below", a_in("sub/m-1.safetensors"), kPlain},
    {"shard_dot", a_in("./m-1.safetensors"), kPlain},
    {"shard_dot_dot", a_in(".."), kPlain + "\"..\""},
    {"shard_empty", a_in(""), kPlain + "\"\""},
    {"shard_pickle", a_in("pytorch_model.bin"), kPlain + "\"pytorch_model.bin\""},
    {"shard_with_nul", a_in("m-1.safetensors\\u0000.safetensors"), kPlain},
    {"shard_url", a_in("http://x/m.safetensors"), kPlain},
    {"shard_missing", a_in("m-3.safetensors"),
     "/m-3.safetensors] expected a shard, which model.safetensors.index.json names, got no such "
     "file",
     true},
    {"shard_removed", removed("m-2.safetensors"), "/m-2.safetensors] expected a shard", true},
    {"shard_is_a_folder", replaced_by_folder("m-2.safetensors"),
     "/m-2.safetensors] expected a regular file, got a folder"},
    {"shard_is_cut", resized("m-1.safetensors", 100), "/m-1.safetensors] header length: expected"},

    {"tensor_missing", written("m-1.safetensors", tensors("a")),
     "/m-1.safetensors] tensors: expected b, as in model.safetensors.index.json, got none of that "
     "name"},
    {"tensors_missing",
     written(kIndex, index(R"("v":"m-2.safetensors","w":"m-2.safetensors",)"
                           R"("x":"m-2.safetensors","y":"m-2.safetensors",)"
                           R"("z":"m-2.safetensors","c":"m-2.safetensors")")),
     "/m-2.safetensors] tensors: expected v, w, x and 2 more, as in"},
    {"tensor_extra", written("m-2.safetensors", tensors("c d")),
     "/m-2.safetensors] tensors: expected only those that model.safetensors.index.json lists for "
     "this "
     "shard, got d"},
    {"tensors_extra", written("m-2.safetensors", tensors("c d e f g")),
     "shard, got d, e, f and 1 more"},
    {"tensor_in_the_other_shard", a_in("m-2.safetensors"),
     "/m-1.safetensors] tensors: expected only"},
    {"tensor_in_two_shards", written("m-2.safetensors", tensors("c a")),
     "tensor a: expected in one shard, got both "},
};

INSTANTIATE_TEST_SUITE_P(All, CheckpointErrors, testing::ValuesIn(kBadFolders),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace bicache
