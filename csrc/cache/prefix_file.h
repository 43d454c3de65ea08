// Prefix files: the entries of a PrefixStore on disk, to be had again by a later process.
//
// A file holds the token ids of prompts, the salts that keep users apart, and what the model made
// of them. It is as secret as the prompts are: only its owner may read it (mode 0600).
//
// Format 2. Numbers are little-endian, u: unsigned, i: signed; nothing is padded.
//
//   header   magic              8 bytes  "bcprefix"
//            version            u32      2
//            layers             u32      L
//            kv_width           u64      G * D
//            dim                u64      E
//            dtype of K and V   u32      0: f32, 1: bf16
//            residual dtype     u32      0: f32, 1: bf16
//            fingerprint bytes  u32      at most 65536
//            entries            u64      the least recently used first
//            fingerprint
//            checksum           u64
//   entry    tokens             u64      p, at least 1
//            salt bytes         u64
//            source             u32      0: alone, 1: first_request
//            kv_layers          u32      0..L
//            joins              u32
//            checksum           u64
//            token ids          i32 each, >= 0
//            salt
//            join layers        u32 each, ascending, 1..L-1
//            K and V            [kv_layers, p, 2, G, D]
//            residuals          [joins, p, E]
//            checksum           u64
//
// A checksum covers the file up to itself: it is `sum`, which begins as 0 and becomes
// hash_bytes(field, sum) with every field, list or array before it (checksums too, empty ones not;
// each residual is a field of its own); fields of more than 1 MiB count as several of 1 MiB and a
// rest. So nothing can be missing, twice or in another order either. It finds damage; it does not
// stop someone who wants to forge a file.
#pragma once

#include <cstdint>
#include <string>

#include "cache/prefix_store.h"

namespace bicache {

// What the entries of a store belong to.
struct StoreShape {
  int layers = 0;                 // L
  int64_t kv_width = 0, dim = 0;  // G * D, E
  EntryTypes types;
  std::string fingerprint;  // of the model and of the way it computes; at most 65536 bytes
};

// Writes all kept entries; how many. `path` is replaced when the new file is complete and on disk,
// and only then. While it runs, the store cannot evict what it writes. FileError; an entry that is
// not of `shape` is std::logic_error.
int64_t save_prefixes(const PrefixStore& store, const StoreShape& shape, const std::string& path);

struct Restored {
  int64_t entries = 0;  // in the file
  int64_t kept = 0;     // of them, those that the store now has, in full
};

// Reads and checks the whole file, then inserts its entries as the most recently used; entries of
// the store that hold as much stay, where they are. While it reads it holds no more than the
// store's budget and one entry, and the ids and salts of all. FileError if the file cannot be read;
// std::invalid_argument, with the store as it was, if it is not a regular file, not of `shape`, or
// damaged.
Restored restore_prefixes(PrefixStore& store, const StoreShape& shape, const std::string& path);

}  // namespace bicache
