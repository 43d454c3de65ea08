#include "cache/prefix_file.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <compare>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/hash.h"
#include "files/atomic_file.h"
#include "files/json.h"
#include "files/mapped_file.h"

namespace bicache {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are written as they are held");

constexpr std::string_view kMagic = "bcprefix";
constexpr uint32_t kVersion = 2;
constexpr size_t kMaxFingerprintBytes = 1 << 16;
constexpr size_t kPieceBytes = 1 << 20;  // of a checksum
// Those of an entry of one token that holds nothing.
constexpr int64_t kMinEntryBytes = 8 + 8 + 4 + 4 + 4 + 8 + 4 + 8;

// Calls f with the pieces of a field that its checksum is made of.
template <class T, class F>
void for_each_piece(std::span<T> bytes, F&& f) {
  for (; !bytes.empty(); bytes = bytes.subspan(std::min(bytes.size(), kPieceBytes)))
    f(bytes.first(std::min(bytes.size(), kPieceBytes)));
}

class Writer {
 public:
  explicit Writer(const std::string& path) : file_(path) {}

  void bytes(std::span<const std::byte> field) {
    for_each_piece(field, [&](std::span<const std::byte> piece) {
      file_.write(piece);
      sum_ = hash_bytes(piece, sum_);
    });
  }
  void text(std::string_view field) { bytes(std::as_bytes(std::span(field))); }
  template <class T>
  void number(T x) {
    bytes(std::as_bytes(std::span(&x, 1)));
  }
  void checksum() { number<uint64_t>(sum_); }
  void commit() { file_.commit(); }

 private:
  AtomicFile file_;
  uint64_t sum_ = 0;
};

// Through read(2): the pages of a mapped file that someone truncates meanwhile are a SIGBUS.
class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), fd_(open_regular(path, &size_)) {}
  ~Reader() { ::close(fd_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // The part of the file that comes now, for messages.
  void enter(std::string part) { part_ = std::move(part); }
  int64_t at() const { return static_cast<int64_t>(at_); }
  int64_t left() const { return static_cast<int64_t>(size_ - at_); }
  // "[path] part what: expected ..."
  template <class... Parts>
  void expect(bool ok, const char* what, const Parts&... parts) const {
    require(ok, "[", path_, "] ", part_, " ", what, ": expected ", parts...);
  }
  std::string where(const char* what) const { return cat(path_, ": ", part_, " ", what); }

  void bytes(std::span<std::byte> field, const char* what) {
    expect(field.size() <= size_ - at_, what, field.size(), " bytes, got the last ", left(),
           " of the file (is it truncated?)");
    for_each_piece(field, [&](std::span<std::byte> piece) {
      fill(piece);
      sum_ = hash_bytes(piece, sum_);
    });
  }
  template <class T>
  T number(const char* what) {
    T x;
    bytes(std::as_writable_bytes(std::span(&x, 1)), what);
    return x;
  }
  // A vector or a string of `count`, for which the file must have bytes before it is made.
  template <class List>
  List list(uint64_t count, const char* what) {
    constexpr size_t each = sizeof(typename List::value_type);
    expect(count <= (size_ - at_) / each, what, "at most the ", (size_ - at_) / each,
           " for which the file has bytes left, got ", count);
    List all(static_cast<size_t>(count), {});
    bytes(std::as_writable_bytes(std::span(all)), what);
    return all;
  }
  void checksum() {
    const uint64_t sum = sum_;
    const auto stored = number<uint64_t>("checksum");
    expect(stored == sum, "checksum", stored, ", as is stored, got ", sum,
           " (the file is damaged)");
  }

 private:
  void fill(std::span<std::byte> out) {
    at_ += out.size();
    while (!out.empty()) {
      if (buffered_.empty() && out.size() >= buffer_.size()) {
        out = out.subspan(read_some(out));
        continue;
      }
      if (buffered_.empty()) buffered_ = std::span(buffer_).first(read_some(buffer_));
      const size_t count = std::min(out.size(), buffered_.size());
      std::memcpy(out.data(), buffered_.data(), count);
      out = out.subspan(count);
      buffered_ = buffered_.subspan(count);
    }
  }
  size_t read_some(std::span<std::byte> out) const {
    ssize_t n = 0;
    while ((n = ::read(fd_, out.data(), out.size())) < 0) {
      if (errno != EINTR) fail_file(errno, path_, "read");
    }
    require(n > 0, "[", path_, "] file size: expected ", size_,
            " bytes, as when it was opened, got fewer");
    return static_cast<size_t>(n);
  }

  std::string path_, part_ = "header";
  size_t size_ = 0, at_ = 0;
  int fd_;
  uint64_t sum_ = 0;
  std::array<std::byte, 1 << 16> buffer_;
  std::span<const std::byte> buffered_;  // of buffer_, not yet given out
};

struct Key {
  EntryNeeds::Source source;
  std::string salt;
  std::vector<int32_t> tokens;
  PrefixKey view() const { return {tokens, source, salt}; }
  auto operator<=>(const Key&) const = default;
};

bool fits(const StoreShape& shape, const PrefixStore::Item& item) {
  const PrefixEntry& e = *item.entry;
  const std::vector<int> joins = e.joins();  // ascending
  return e.rows() > 0 && e.rows() == static_cast<int64_t>(item.tokens.size()) &&
         e.kv_width() == shape.kv_width && e.dim() == shape.dim && e.types() == shape.types &&
         e.kv_layers() <= shape.layers &&
         (joins.empty() || (joins.front() > 0 && joins.back() < shape.layers));
}

void write_entry(Writer& out, const PrefixStore::Item& item) {
  const PrefixEntry& entry = *item.entry;
  const std::vector<int> joins = entry.joins();
  out.number<uint64_t>(item.tokens.size());
  out.number<uint64_t>(item.salt.size());
  out.number<uint32_t>(item.source == EntryNeeds::Source::alone ? 0 : 1);
  out.number(static_cast<uint32_t>(entry.kv_layers()));
  out.number(static_cast<uint32_t>(joins.size()));
  out.checksum();
  out.bytes(std::as_bytes(std::span(item.tokens)));
  out.text(item.salt);
  out.bytes(std::as_bytes(std::span(joins)));
  for (const std::span<const std::byte> part : entry.parts()) out.bytes(part);
  out.checksum();
}

// Two fingerprints, each cut to what a message can show; what both begin with goes first.
std::pair<std::string, std::string> shown(const std::string& a, const std::string& b) {
  constexpr size_t kShown = 80, kBefore = 20;
  const auto same =
      static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
  if (std::max(a.size(), b.size()) <= kShown || same <= kBefore) return {quote(a), quote(b)};
  const size_t from = same - kBefore;
  return {"..." + quote(a.substr(from)), "..." + quote(b.substr(from))};
}

uint32_t code(DType type) { return type == DType::f32 ? 0 : 1; }

void expect_type(const Reader& in, const char* what, uint32_t stored, DType type) {
  in.expect(stored <= 1, what, "0 (f32) or 1 (bf16), got ", stored);
  in.expect(stored == code(type), what, name(type), ", got ",
            name(stored == 0 ? DType::f32 : DType::bf16));
}

// How many entries follow.
uint64_t read_header(Reader& in, const StoreShape& shape) {
  std::string magic(kMagic.size(), '\0');
  in.bytes(std::as_writable_bytes(std::span(magic)), "magic");
  in.expect(magic == kMagic, "magic", "a bicache prefix file, which begins with \"", kMagic,
            "\", got ", quote(magic));
  const auto version = in.number<uint32_t>("version");
  in.expect(version == kVersion, "version", kVersion, ", which is the one this bicache reads, got ",
            version);
  const auto layers = in.number<uint32_t>("layers");
  const auto kv_width = in.number<uint64_t>("kv_width");
  const auto dim = in.number<uint64_t>("dim");
  const auto kv_dtype = in.number<uint32_t>("dtype of K and V");
  const auto residual_dtype = in.number<uint32_t>("residual dtype");
  const auto fingerprint_bytes = in.number<uint32_t>("fingerprint bytes");
  const auto entries = in.number<uint64_t>("entries");
  in.expect(fingerprint_bytes <= kMaxFingerprintBytes, "fingerprint bytes", "at most ",
            kMaxFingerprintBytes, ", got ", fingerprint_bytes);
  const auto fingerprint = in.list<std::string>(fingerprint_bytes, "fingerprint");
  in.checksum();

  const auto [ours, theirs] = shown(shape.fingerprint, fingerprint);
  in.expect(fingerprint == shape.fingerprint, "fingerprint", "the prefixes of model ", ours,
            ", got those of ", theirs);
  expect_type(in, "dtype of K and V", kv_dtype, shape.types.kv);
  expect_type(in, "residual dtype", residual_dtype, shape.types.residual);
  in.expect(std::cmp_equal(layers, shape.layers), "layers", shape.layers, ", got ", layers);
  in.expect(std::cmp_equal(kv_width, shape.kv_width), "kv_width", shape.kv_width, ", got ",
            kv_width);
  in.expect(std::cmp_equal(dim, shape.dim), "dim", shape.dim, ", got ", dim);
  const int64_t most = in.left() / kMinEntryBytes;
  in.expect(std::cmp_less_equal(entries, most), "entries", "at most the ", most,
            " for which the file has bytes left, got ", entries);
  return entries;
}

std::vector<int> read_joins(Reader& in, uint32_t count, int layers) {
  const auto stored = in.list<std::vector<uint32_t>>(count, "join layers");
  std::vector<int> joins;
  for (const uint32_t l : stored) {
    const int least = joins.empty() ? 1 : joins.back() + 1;
    in.expect(std::cmp_greater_equal(l, least) && std::cmp_less(l, layers), "join layers",
              "ascending ones in 1..", layers - 1, ", got ", l,
              joins.empty() ? "" : cat(" after ", joins.back()));
    joins.push_back(static_cast<int>(l));
  }
  return joins;
}

// One entry; `key` becomes its key.
std::shared_ptr<PrefixEntry> read_entry(Reader& in, const StoreShape& shape, Key& key) {
  const auto tokens = in.number<uint64_t>("tokens");
  const auto salt_bytes = in.number<uint64_t>("salt bytes");
  const auto source = in.number<uint32_t>("source");
  const auto kv_layers = in.number<uint32_t>("kv_layers");
  const auto joins = in.number<uint32_t>("joins");
  in.checksum();
  in.expect(tokens > 0, "tokens", "at least 1, got 0");
  in.expect(source <= 1, "source", "0 (alone) or 1 (first_request), got ", source);
  in.expect(std::cmp_less_equal(kv_layers, shape.layers), "kv_layers", "at most ", shape.layers,
            " (the model's layers), got ", kv_layers);
  in.expect(std::cmp_less(joins, shape.layers), "joins", "fewer than the model's ", shape.layers,
            " layers, got ", joins);

  key.source = source == 0 ? EntryNeeds::Source::alone : EntryNeeds::Source::first_request;
  key.tokens = in.list<std::vector<int32_t>>(tokens, "token ids");
  const int32_t lowest = *std::min_element(key.tokens.begin(), key.tokens.end());
  in.expect(lowest >= 0, "token ids", "none below 0, got ", lowest);
  key.salt = in.list<std::string>(salt_bytes, "salt");
  const EntryNeeds needs{key.source, static_cast<int>(kv_layers),
                         read_joins(in, joins, shape.layers)};

  const auto rows = static_cast<int64_t>(tokens);
  const std::string where = in.where("K, V and residuals");
  const int64_t bytes =
      PrefixEntry::size_bytes(rows, shape.kv_width, shape.dim, needs, shape.types, where.c_str());
  in.expect(bytes <= in.left(), "K, V and residuals", bytes, " bytes, got the last ", in.left(),
            " of the file (is it truncated?)");
  auto entry = std::make_shared<PrefixEntry>(rows, shape.kv_width, shape.dim, needs, shape.types);
  for (const std::span<std::byte> part : entry->parts()) in.bytes(part, "K, V and residuals");
  in.checksum();
  return entry;
}

}  // namespace

int64_t save_prefixes(const PrefixStore& store, const StoreShape& shape, const std::string& path) {
  require(shape.fingerprint.size() <= kMaxFingerprintBytes,
          "[prefix file] fingerprint: expected at most ", kMaxFingerprintBytes, " bytes, got ",
          shape.fingerprint.size());
  const std::vector<PrefixStore::Item> items = store.items();
  for (const PrefixStore::Item& item : items)
    internal_check(fits(shape, item), "[prefix file] entry: expected one of the store's shape");
  Writer out(path);
  out.text(kMagic);
  out.number(kVersion);
  out.number(static_cast<uint32_t>(shape.layers));
  out.number(static_cast<uint64_t>(shape.kv_width));
  out.number(static_cast<uint64_t>(shape.dim));
  out.number(code(shape.types.kv));
  out.number(code(shape.types.residual));
  out.number(static_cast<uint32_t>(shape.fingerprint.size()));
  out.number<uint64_t>(items.size());
  out.text(shape.fingerprint);
  out.checksum();
  for (const PrefixStore::Item& item : items) write_entry(out, item);
  out.commit();
  return static_cast<int64_t>(items.size());
}

Restored restore_prefixes(PrefixStore& store, const StoreShape& shape, const std::string& path) {
  struct Held {
    const Key* key;
    std::shared_ptr<const PrefixEntry> entry;
    int64_t size_bytes;
  };
  Reader in(path);
  const uint64_t entries = read_header(in, shape);
  const int64_t budget_bytes = store.stats().budget_bytes;
  std::map<Key, EntryNeeds> all;
  std::deque<Held> held;  // those that an empty store would keep
  int64_t held_bytes = 0;
  for (uint64_t i = 1; i <= entries; ++i) {
    in.enter(cat("entry ", i, " of ", entries, " (from byte ", in.at(), ")"));
    Key key;
    std::shared_ptr<const PrefixEntry> entry = read_entry(in, shape, key);
    const EntryNeeds needs{key.source, entry->kv_layers(), entry->joins()};
    const int64_t size_bytes =
        PrefixStore::Item{key.tokens, key.source, key.salt, entry}.size_bytes();
    const auto [it, is_new] = all.emplace(std::move(key), needs);
    in.expect(is_new, "key", "each source, salt and token ids once, got them again");
    if (size_bytes > budget_bytes) continue;
    held.push_back({&it->first, std::move(entry), size_bytes});
    for (held_bytes += size_bytes; held_bytes > budget_bytes; held.pop_front())
      held_bytes -= held.front().size_bytes;
  }
  in.enter("end");
  in.expect(in.left() == 0, "of the file", "it after the last entry, got ", in.left(),
            " more bytes");

  for (Held& h : held) {
    const EntryNeeds& needs = all.at(*h.key);
    const PrefixKey key = h.key->view();
    // Moved, so that it is not pinned by us when the next one needs its room.
    if (h.entry->covers(store.widened(key, needs))) store.insert(key, std::move(h.entry));
  }
  Restored restored{static_cast<int64_t>(entries), 0};
  for (const PrefixStore::Item& item : store.items()) {
    const auto it = all.find({item.source, item.salt, item.tokens});
    if (it != all.end() && item.entry->covers(it->second)) ++restored.kept;
  }
  return restored;
}

}  // namespace bicache
