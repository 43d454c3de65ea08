#include "files/gguf_checkpoint.h"

#include <cstdio>

#include "base/check.h"
#include "files/ggml_types.h"
#include "files/gguf_config.h"
#include "files/safetensors.h"

namespace bicache {
namespace {

constexpr size_t kMostFiles = 1024;

// A value of the split, of a file that has one.
int64_t split_value(const Gguf& file, const char* key, int64_t fallback) {
  const auto it = file.metadata().find(key);
  if (it == file.metadata().end()) return fallback;
  return it->second.integer("gguf", file.path() + ": " + key);
}

// "-00002-of-00003.gguf".
std::string split_suffix(int64_t number, int64_t count) {
  char text[64];
  std::snprintf(text, sizeof text, "-%05lld-of-%05lld.gguf", static_cast<long long>(number + 1),
                static_cast<long long>(count));
  return text;
}

// `text` with the one-letter word `letter` between its dots replaced.
std::string filled(std::string text, const char* letter, const std::string& by) {
  const size_t at = text.find(cat(".", letter, "."));
  if (at != std::string::npos) text.replace(at + 1, 1, by);
  return text;
}

// "12" of "blk.12.attn_q.weight" where the pattern has N; empty: another name.
bool matches(const std::string& name, const std::string& pattern, std::string* layer) {
  const size_t at = pattern.find(".N.");
  if (at == std::string::npos) return name == pattern;
  const std::string head = pattern.substr(0, at + 1), tail = pattern.substr(at + 2);
  if (name.size() <= head.size() + tail.size() || !name.starts_with(head) || !name.ends_with(tail))
    return false;
  *layer = name.substr(head.size(), name.size() - head.size() - tail.size());
  return layer->find_first_not_of("0123456789") == std::string::npos;
}

}  // namespace

GgufCheckpoint::GgufCheckpoint(const std::string& path) {
  files_.emplace_back(path);
  architecture_ = &gguf_architecture(files_[0]);
  open_others(path);
  add_tensors();
  const GgufName& name = architecture_->names[0];
  const auto embedding = places_.find(name.folder);
  require(embedding != places_.end() && embedding->second.tensor.shape.size() == 2, "[gguf] ", path,
          ": tensor ", name.gguf, ": expected a matrix, got none");
  config_ = gguf_config(files_[0], *architecture_, embedding->second.tensor.shape[0]);
}

void GgufCheckpoint::open_others(const std::string& path) {
  const int64_t count = split_value(files_[0], "split.count", 1);
  require(0 <= count && count <= static_cast<int64_t>(kMostFiles), "[gguf] ", path,
          ": split.count: expected 1..", kMostFiles, ", got ", count);
  if (count <= 1) return;
  const int64_t number = split_value(files_[0], "split.no", -1);
  const std::string suffix = split_suffix(number, count);
  require(path.ends_with(suffix), "[gguf] ", path, ": expected a name that ends with ", suffix,
          ", as its split.no and split.count say, got another");
  const std::string stem = path.substr(0, path.size() - suffix.size());
  require(number == 0, "[gguf] ", path, ": expected the first file of the model, ", stem,
          split_suffix(0, count), ", got number ", number + 1);
  for (int64_t i = 1; i < count; ++i) {
    const Gguf& file = files_.emplace_back(stem + split_suffix(i, count));
    const int64_t no = split_value(file, "split.no", -1), of = split_value(file, "split.count", -1);
    require(no == i && of == count, "[gguf] ", file.path(), ": split.no, split.count: expected ", i,
            ", ", count, ", got ", no, ", ", of);
  }
  size_t tensors = 0;
  for (const Gguf& file : files_) tensors += file.tensors().size();
  const int64_t expected =
      split_value(files_[0], "split.tensors.count", static_cast<int64_t>(tensors));
  require(expected == static_cast<int64_t>(tensors), "[gguf] ", path,
          ": split.tensors.count: expected ", tensors, ", which the files have together, got ",
          expected);
}

void GgufCheckpoint::add(const std::string& name, Place place) {
  const std::string stored = place.stored_name;
  const auto [at, is_new] = places_.emplace(name, std::move(place));
  require(is_new, "[gguf] ", path(), ": tensor ", printable(stored),
          ": expected once in all files, got it again (as ", printable(at->second.stored_name),
          ")");
}

void GgufCheckpoint::add_tensors() {
  constexpr int64_t kMostParts = 65536;
  const Architecture& architecture = *architecture_;
  for (size_t f = 0; f < files_.size(); ++f) {
    for (const auto& [stored_name, tensor] : files_[f].tensors()) {
      Place place = {f, stored_name, tensor};
      std::string name = stored_name, layer;
      for (const GgufName& pattern : architecture.names) {
        if (matches(stored_name, pattern.gguf, &layer)) name = filled(pattern.folder, "N", layer);
      }
      if (name.find(".X.") != std::string::npos) {
        require(tensor.shape.size() == 3 && tensor.shape[0] <= kMostParts, "[gguf] ", path(),
                ": tensor ", stored_name, ": expected 3 dimensions, one for at most ", kMostParts,
                " experts, got ", shape_text(tensor.shape));
        for (place.part = 0; place.part < tensor.shape[0]; ++place.part)
          add(filled(name, "X", std::to_string(place.part)), place);
        continue;
      }
      if (architecture.interleaved &&
          (name.ends_with(".q_proj.weight") || name.ends_with(".k_proj.weight"))) {
        place.interleaved_head = gguf_head_dim(files_[0], architecture);
        require(tensor.shape.size() == 2 && tensor.shape[0] % place.interleaved_head == 0,
                "[gguf] ", path(), ": tensor ", stored_name, ": expected whole heads of ",
                place.interleaved_head, " rows, got ", shape_text(tensor.shape));
      }
      add(name, std::move(place));
    }
  }
  // Without a head of its own, a model's embedding is its head.
  const std::string embedding = architecture.names[0].folder, head = architecture.names[2].folder;
  if (places_.contains(embedding) && !places_.contains(head))
    places_.emplace(head, places_.at(embedding));
}

std::vector<std::string> GgufCheckpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : places_) names.push_back(name);
  return names;
}

std::string GgufCheckpoint::stored_name(const std::string& name) const {
  std::string layer;
  for (const GgufName& pattern : architecture_->names) {
    if (matches(name, pattern.folder, &layer)) return filled(pattern.gguf, "N", layer);
  }
  return name;
}

Tensor GgufCheckpoint::tensor(const std::string& name) const {
  const Place& place = places_.at(name);
  const GgufTensor& t = place.tensor;
  require(t.format->widen != nullptr, "[gguf] ", files_[place.file].path(), ": tensor ",
          printable(place.stored_name), ": expected one of the types ", readable_ggml_types(),
          ", got ", t.format->name);
  Tensor out{name,
             *t.format,
             t.shape,
             files_[place.file].data(t),
             place.interleaved_head,
             place.stored_name};
  if (place.part >= 0) {
    out.shape.erase(out.shape.begin());
    const size_t size = out.bytes.size() / static_cast<size_t>(t.shape[0]);
    out.bytes = out.bytes.subspan(static_cast<size_t>(place.part) * size, size);
  }
  return out;
}

std::vector<Tensor> GgufCheckpoint::stored() const {
  std::vector<Tensor> all;
  for (const Gguf& file : files_) {
    for (const auto& [name, t] : file.tensors())
      all.push_back({name, *t.format, t.shape, file.data(t)});
  }
  return all;
}

void GgufCheckpoint::check_size() const {
  for (const Gguf& file : files_) file.check_size();
}

}  // namespace bicache
