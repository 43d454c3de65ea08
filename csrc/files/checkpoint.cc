#include "files/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <string_view>

#include "base/check.h"

namespace bicache {
namespace {

constexpr size_t kMaxJsonBytes = size_t{64} << 20;
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

void check_folder(const std::string& folder) {
  require(folder.find('\0') == std::string::npos, "[", folder.c_str(),
          "] path: expected no NUL character, got one");
  struct stat info;
  if (::stat(folder.c_str(), &info) != 0) fail_file(errno, folder, "open the model folder");
  require(
      S_ISDIR(info.st_mode), "[", folder,
      "] expected a folder with config.json and model.safetensors, or a .gguf file, got another "
      "file");
}

bool is_folder(const std::string& path) {
  struct stat info;
  return ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

// A dangling link exists: opening it then says what is wrong.
bool exists(const std::string& path) {
  struct stat info;
  if (::lstat(path.c_str(), &info) == 0) return true;
  if (errno != ENOENT) fail_file(errno, path, "stat");
  return false;
}

[[noreturn]] void fail_no_weights(const std::string& folder) {
  std::vector<std::string> pickles;
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    const std::string extension = it->path().extension().string();
    for (const char* known : {".bin", ".pt", ".pth", ".ckpt"}) {
      if (extension == known) pickles.push_back(it->path().filename().string());
    }
  }
  std::sort(pickles.begin(), pickles.end());
  require(pickles.empty(), "[", folder, "] weights: expected ", kSingle, " or ", kIndex, ", got ",
          pickles.empty() ? "" : quote(pickles[0]),
          ", a pickle; pickles can run code when they are read and are refused: convert the "
          "checkpoint to safetensors");
  throw FileError(
      ENOENT, folder,
      cat("[", folder, "] weights: expected ", kSingle, " or ", kIndex, ", got neither"));
}

// A shard lies in the folder itself: an index must not reach files elsewhere.
void check_shard_name(const std::string& file, const std::string& where,
                      const std::string& tensor) {
  const bool plain = file.find_first_of(std::string_view("/\0", 2)) == std::string::npos;
  require(plain && file.ends_with(".safetensors"), "[", where, "] weight_map ", printable(tensor),
          ": expected the plain name of a .safetensors file of the folder, got ", quote(file));
}

// The first few of `names`.
std::string listed(const std::vector<std::string>& names) {
  constexpr size_t kFew = 3;
  std::string out;
  for (size_t i = 0; i < names.size() && i < kFew; ++i) {
    out += (i > 0 ? ", " : "") + printable(names[i]);
  }
  return names.size() > kFew ? cat(out, " and ", names.size() - kFew, " more") : out;
}

// The shard holds exactly the tensors that the index gives it (both sorted).
void check_shard(const SafeTensors& shard, const std::vector<std::string>& expected) {
  std::vector<std::string> present, missing, extra;
  for (const auto& [name, info] : shard.tensors()) present.push_back(name);
  std::set_difference(expected.begin(), expected.end(), present.begin(), present.end(),
                      std::back_inserter(missing));
  std::set_difference(present.begin(), present.end(), expected.begin(), expected.end(),
                      std::back_inserter(extra));
  require(missing.empty(), "[", shard.path(), "] tensors: expected ", listed(missing), ", as in ",
          kIndex, ", got none of that name");
  require(extra.empty(), "[", shard.path(), "] tensors: expected only those that ", kIndex,
          " lists for this shard, got ", listed(extra));
}

}  // namespace

Json read_json(const std::string& path) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  require(bytes.size() <= kMaxJsonBytes, "[", path, "] file size: expected at most ", kMaxJsonBytes,
          " bytes, got ", bytes.size());
  Json json = Json::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path);
  json.object(path);
  return json;
}

Checkpoint::Checkpoint(const std::string& path) : folder_(path) {
  if (path.ends_with(".gguf") && !is_folder(path)) {
    gguf_.emplace(path);
  } else {
    open_folder();
  }
}

void Checkpoint::open_folder() {
  const std::string& folder = folder_;
  check_folder(folder);
  config_ = read_json(folder + "/config.json");
  // Hugging Face's precedence: a single file wins over an index, which is then not even read. With
  // the reverse, one folder would be two models, depending on who loads it.
  if (const std::string single = folder + "/" + kSingle; exists(single)) {
    add_shard(single);
  } else if (exists(folder + "/" + kIndex)) {
    open_shards();
  } else {
    fail_no_weights(folder);
  }
}

void Checkpoint::open_shards() {
  const std::string path = folder_ + "/" + kIndex;
  const Json index = read_json(path);
  const Json* map = index.find("weight_map");
  require(map != nullptr, "[", path, "] expected the field weight_map, got none");
  std::map<std::string, std::vector<std::string>> names_of;
  for (const auto& [name, value] : map->object(path, "weight_map")) {
    const std::string& file = value.string(path, "weight_map " + printable(name));
    check_shard_name(file, path, name);
    names_of[file].push_back(name);
  }
  require(!names_of.empty(), "[", path, "] weight_map: expected at least one tensor, got none");
  for (auto& [file, names] : names_of) {
    const std::string shard = folder_ + "/" + file;
    if (!exists(shard)) {
      throw FileError(
          ENOENT, shard,
          cat("[", shard, "] expected a shard, which ", kIndex, " names, got no such file"));
    }
    add_shard(shard);
    std::sort(names.begin(), names.end());
  }
  size_t shard = 0;
  for (const auto& [file, names] : names_of) check_shard(shards_[shard++], names);
}

void Checkpoint::add_shard(const std::string& path) {
  const size_t index = shards_.size();
  shards_.emplace_back(path);
  for (const auto& [name, info] : shards_[index].tensors()) {
    const auto [at, is_new] = where_.emplace(name, index);
    require(is_new, "[", folder_, "] tensor ", printable(name),
            ": expected in one shard, got both ", shards_[at->second].path(), " and ", path);
  }
}

std::vector<std::string> Checkpoint::names() const {
  if (gguf_) return gguf_->names();
  std::vector<std::string> names;
  for (const auto& [name, shard] : where_) names.push_back(name);
  return names;
}

Tensor Checkpoint::tensor(const std::string& name) const {
  if (!has(name)) {
    fail("[", folder_, "] tensor ", printable(gguf_ ? gguf_->stored_name(name) : name),
         ": expected in the checkpoint, got nothing of that name");
  }
  if (gguf_) return gguf_->tensor(name);
  const SafeTensors& shard = shards_[where_.at(name)];
  const TensorInfo& info = shard.tensors().at(name);
  require(info.dtype == "F32" || info.dtype == "BF16", "[", folder_, "] tensor ", printable(name),
          ": expected type F32 or BF16, got ", info.dtype);
  return {name, info.dtype == "F32" ? DType::f32 : DType::bf16, info.shape, shard.data(info)};
}

Tensor Checkpoint::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  Tensor t = tensor(name);
  require(t.shape == shape, "[", folder_, "] tensor ",
          printable(t.stored_name.empty() ? name : t.stored_name), ": expected shape ",
          shape_text(shape), ", got ", shape_text(t.shape));
  return t;
}

std::vector<Tensor> Checkpoint::stored() const {
  if (gguf_) return gguf_->stored();
  std::vector<Tensor> all;
  for (const auto& [name, shard] : where_) all.push_back(tensor(name));
  return all;
}

int64_t Checkpoint::size_bytes() const {
  int64_t bytes = 0;
  if (gguf_) {
    for (const Tensor& t : gguf_->stored())
      bytes = checked_add(bytes, static_cast<int64_t>(t.bytes.size()), "checkpoint");
  }
  for (const SafeTensors& shard : shards_) {
    for (const auto& [name, t] : shard.tensors()) {
      bytes = checked_add(bytes, t.end - t.begin, "checkpoint");
    }
  }
  return bytes;
}

void Checkpoint::check_size() const {
  for (const SafeTensors& shard : shards_) shard.check_size();
  if (gguf_) gguf_->check_size();
}

}  // namespace bicache
