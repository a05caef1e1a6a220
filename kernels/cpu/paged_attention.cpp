// Causal attention over a paged cache, prefill and decode rows in one call; kernels/paged_attention.py has the formula.
//
// The result of a row never depends on how rows are grouped, on the threads or on other sequences (attention_chunk.h).
// Work is shared out as units: a tile of queries of one sequence for one kv head, with all query heads that read it, so
// that a chunk of keys and values is used by many rows while it is in the cache; or, for a single query, for several kv
// heads, so that pages are read from memory in the order in which they lie there. With too few units for the threads (a
// decode step of few sequences), the chunks of a unit are shared out too, and the partials meet in a scratch buffer.
#include <algorithm>
#include <vector>

#include "attention_chunk.h"
#include "parallel.h"
#include "scratch.h"

namespace pilotfish {
namespace {

constexpr int64_t kMaxUnitRows = 48;
constexpr int64_t kMaxChunkBytes = 384 * 1024;  // keys and values of all heads of a unit: a part of L2
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kWorkPerThread = 1 << 18;
constexpr int64_t kMaxSplitFloats = 4 << 20;

template <class Cache>
struct Pages {
  const Cache* base;
  int64_t block_stride, slot_stride, head_stride;
};

template <class Cache>
struct Attention {
  const float* q;
  int64_t q_token_stride, q_head_stride;
  Pages<Cache> k, v;
  int64_t page_len, num_kv_heads, group, head_dim;
  const int32_t* block_tables;
  int64_t table_stride;
  const int32_t* query_starts;
  const int32_t* context_lens;
  int64_t num_sequences;
  float scale;
  int64_t window;      // 0: none
  float soft_cap;      // 0: none
  const float* sinks;  // may be null
  float* out;          // [tokens, heads, head_dim]
};

// Query rows of one sequence: kv heads x queries x heads of the group. Query i sits at position `position` + i.
struct Unit {
  int64_t sequence, first_head, num_heads, first_token, num_queries, position;
  int64_t first_chunk, end_chunk;
  int64_t rows_per_head, rows;
  int64_t first_partial;  // in split mode: where its chunks' partials start, in floats
};

struct RowPlace {
  int64_t token, head;
};

RowPlace place_of(const Unit& unit, int64_t group, int64_t row) {
  const int64_t kv_head = unit.first_head + row / unit.rows_per_head, row_of_head = row % unit.rows_per_head;
  return {unit.first_token + row_of_head / group, kv_head * group + row_of_head % group};
}

// What a row at `position` sees of a chunk.
KeyRange visible(int64_t chunk, int64_t position, int64_t window) {
  const int64_t start = chunk * kChunk;
  const int64_t first = window > 0 ? std::max<int64_t>(position - window + 1, 0) : 0;
  return {static_cast<int>(std::max<int64_t>(first - start, 0)),
          static_cast<int>(std::min<int64_t>(position + 1 - start, kChunk))};
}

// Per thread: a unit's queries; one head's keys of a chunk; scores of a group of rows; where the keys and values of this
// chunk and of the one to come are, for a unit's first head.
template <class Cache>
struct Workspace {
  float* queries;          // [rows, padded head_dim], scaled
  float* keys_transposed;  // [head_dim, kChunk]
  float* scores;           // [kRowGroup, kChunk]
  Partial chunk, total;
  ChunkPlaces<Cache> places[2];

  Workspace(int64_t rows, int64_t head_dim) {
    thread_local AlignedBuffer memory;
    const int64_t partial = partial_floats(rows, head_dim);
    queries = memory.reserve((rows + kChunk) * padded(head_dim) + kRowGroup * kChunk + 2 * partial);
    keys_transposed = queries + rows * padded(head_dim);
    scores = keys_transposed + kChunk * padded(head_dim);
    float* partials = scores + kRowGroup * kChunk;
    chunk = partial_at(partials, rows);
    total = partial_at(partials + partial, rows);
  }
};

template <class Cache>
void gather_queries(const Attention<Cache>& a, const Unit& unit, float* queries) {
  for (int64_t row = 0; row < unit.rows; ++row) {
    const auto [token, head] = place_of(unit, a.group, row);
    const float* q = a.q + token * a.q_token_stride + head * a.q_head_stride;
    for (int64_t d = 0; d < a.head_dim; ++d) queries[row * padded(a.head_dim) + d] = q[d] * a.scale;
  }
}

// A page at a time.
template <class Cache>
void locate_chunk(const Attention<Cache>& a, const Unit& unit, int64_t chunk, ChunkPlaces<Cache>& places) {
  const int64_t last_position = unit.position + unit.num_queries - 1;
  places.range = {visible(chunk, unit.position, a.window).begin, visible(chunk, last_position, a.window).end};
  const int32_t* table = a.block_tables + unit.sequence * a.table_stride;
  for (int j = places.range.begin; j < places.range.end;) {
    const int64_t position = chunk * kChunk + j, block = table[position / a.page_len], slot = position % a.page_len;
    const Cache* k = a.k.base + block * a.k.block_stride + slot * a.k.slot_stride + unit.first_head * a.k.head_stride;
    const Cache* v = a.v.base + block * a.v.block_stride + slot * a.v.slot_stride + unit.first_head * a.v.head_stride;
    const int end = static_cast<int>(std::min<int64_t>(places.range.end, j + a.page_len - slot));
    for (; j < end; ++j, k += a.k.slot_stride, v += a.v.slot_stride) places.keys[j] = k, places.values[j] = v;
  }
  const auto [begin, end] = places.range;
  std::fill(places.keys, places.keys + begin, places.keys[begin]);
  std::fill(places.values, places.values + begin, places.values[begin]);
  std::fill(places.keys + end, places.keys + kChunk, places.keys[end - 1]);
  std::fill(places.values + end, places.values + kChunk, places.values[end - 1]);
}

// The partial of every row of the unit for one chunk; rows that see none of its keys get a sum of zero. While it computes,
// the chunk to come is fetched: its values beside the transposing, its keys beside the weighing.
template <class Cache>
void attend_chunk(const Attention<Cache>& a, const Unit& unit, int64_t chunk, const ChunkPlaces<Cache>& now,
                  const ChunkPlaces<Cache>* next, Workspace<Cache>& work, const Partial& out) {
  const auto range_of = [&](int64_t row) { return visible(chunk, unit.position + row / a.group, a.window); };
  const int64_t fetched_bytes = next == nullptr ? 0 : a.head_dim * static_cast<int64_t>(sizeof(Cache));
  const ChunkPlaces<Cache>& fetched = next == nullptr ? now : *next;
  for (int64_t head = 0; head < unit.num_heads; ++head) {
    const int64_t k_offset = head * a.k.head_stride, v_offset = head * a.v.head_stride;
    transpose_keys(now, k_offset, a.head_dim, fetched.values, v_offset, fetched_bytes, work.keys_transposed);
    for (int64_t row = 0; row < unit.rows_per_head; row += kRowGroup) {
      const int num_rows = static_cast<int>(std::min<int64_t>(kRowGroup, unit.rows_per_head - row));
      const KeyRange range = {range_of(row).begin, range_of(row + num_rows - 1).end};
      const int64_t first = head * unit.rows_per_head + row;
      const float* queries = work.queries + first * padded(a.head_dim);
      float* values = out.values + first * padded(a.head_dim);
      with_rows(num_rows, [&](auto n) { score_rows<n>(queries, a.head_dim, work.keys_transposed, range, work.scores); });
      for (int i = 0; i < num_rows; ++i) {
        const KeyRange seen = range_of(row + i);
        weigh_row(work.scores + i * kChunk, seen, a.soft_cap, &out.largest[first + i], &out.sum[first + i]);
      }
      const int64_t num_bytes = row == 0 ? fetched_bytes : 0;
      with_rows(num_rows, [&](auto n) {
        weigh_values<n>(work.scores, a.head_dim, now.values, v_offset, range, fetched.keys, k_offset, num_bytes, values);
      });
    }
  }
}

template <class Cache>
void write_out(const Attention<Cache>& a, const Unit& unit, const Partial& total) {
  for (int64_t row = 0; row < unit.rows; ++row) {
    const auto [token, head] = place_of(unit, a.group, row);
    float factor = 1.0f / total.sum[row];
    if (a.sinks != nullptr) {
      const float largest = std::max(total.largest[row], a.sinks[head]);
      const float keep = exp_scalar(total.largest[row] - largest);
      factor = keep / (total.sum[row] * keep + exp_scalar(a.sinks[head] - largest));
    }
    float* out = a.out + (token * a.num_kv_heads * a.group + head) * a.head_dim;
    const float* values = total.values + row * padded(a.head_dim);
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] = values[d] * factor;
  }
}

// How many kv heads a unit takes on: all that fit, where a single query reads whole keys; else one.
template <class Cache>
int64_t heads_per_unit(const Attention<Cache>& a, int64_t num_queries) {
  const bool neighbours = a.k.head_stride == a.head_dim && a.v.head_stride == a.head_dim;
  if (num_queries > 1 || !neighbours) return 1;
  const int64_t chunk_bytes = 2 * kChunk * a.head_dim * static_cast<int64_t>(sizeof(Cache));
  return std::clamp<int64_t>(kMaxChunkBytes / chunk_bytes, 1, a.num_kv_heads);
}

// Tiles of queries: enough units for the threads to share evenly, but with enough rows to use each key often.
template <class Cache>
std::vector<Unit> list_units(const Attention<Cache>& a, int64_t num_threads) {
  const int64_t num_tokens = a.query_starts[a.num_sequences] - a.query_starts[0];
  const int64_t all_rows = num_tokens * a.group * a.num_kv_heads;
  const int64_t wanted_rows = all_rows / (kUnitsPerThread * num_threads);
  const int64_t unit_queries = std::max<int64_t>(std::min(wanted_rows, kMaxUnitRows) / a.group, 1);
  std::vector<Unit> units;
  for (int64_t s = 0; s < a.num_sequences; ++s) {
    const int64_t start = a.query_starts[s], num_queries = a.query_starts[s + 1] - start;
    const int64_t unit_heads = heads_per_unit(a, num_queries);
    for (int64_t i = 0; i < num_queries; i += unit_queries) {
      const int64_t queries = std::min(unit_queries, num_queries - i);
      const int64_t position = a.context_lens[s] - num_queries + i, end = position + queries;
      const int64_t first_key = a.window > 0 ? std::max<int64_t>(position - a.window + 1, 0) : 0;
      for (int64_t head = 0; head < a.num_kv_heads; head += unit_heads) {
        const int64_t heads = std::min(unit_heads, a.num_kv_heads - head), rows_per_head = queries * a.group;
        units.push_back({s, head, heads, start + i, queries, position, first_key / kChunk, ceil_div(end, kChunk),
                         rows_per_head, heads * rows_per_head, 0});
      }
    }
  }
  return units;
}

// Gives every chunk of every unit a place for its partial. Returns their size in floats.
int64_t place_partials(std::vector<Unit>& units, int64_t head_dim) {
  int64_t total = 0;
  for (Unit& unit : units) {
    unit.first_partial = total;
    total += (unit.end_chunk - unit.first_chunk) * partial_floats(unit.rows, head_dim);
  }
  return total;
}

template <class Cache>
void attend_units(const Attention<Cache>& a, const std::vector<Unit>& units, int64_t num_threads) {
  share_out(units.size(), num_threads, [&](int64_t i) {
    const Unit& unit = units[i];
    Workspace<Cache> work(unit.rows, a.head_dim);
    gather_queries(a, unit, work.queries);
    clear(work.total, unit.rows, a.head_dim);
    ChunkPlaces<Cache>*now = &work.places[0], *next = &work.places[1];
    locate_chunk(a, unit, unit.first_chunk, *now);
    for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; ++chunk, std::swap(now, next)) {
      const bool is_last = chunk + 1 == unit.end_chunk, ends = is_last && i + 1 == static_cast<int64_t>(units.size());
      const Unit& next_unit = is_last && !ends ? units[i + 1] : unit;
      if (!ends) locate_chunk(a, next_unit, is_last ? next_unit.first_chunk : chunk + 1, *next);
      attend_chunk(a, unit, chunk, *now, ends ? nullptr : next, work, work.chunk);
      merge(work.total, work.chunk, unit.rows, a.head_dim);
    }
    write_out(a, unit, work.total);
  });
}

template <class Cache>
void attend_split(const Attention<Cache>& a, const std::vector<Unit>& units, float* partials, int64_t num_threads) {
  struct Piece {
    const Unit* unit;
    int64_t chunk;
    Partial out;
  };
  std::vector<Piece> pieces;
  for (const Unit& unit : units) {
    float* memory = partials + unit.first_partial;
    for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; ++chunk) {
      pieces.push_back({&unit, chunk, partial_at(memory, unit.rows)});
      memory += partial_floats(unit.rows, a.head_dim);
    }
  }
  share_out(pieces.size(), num_threads, [&](int64_t i) {
    const Piece& piece = pieces[i];
    const bool ends = i + 1 == static_cast<int64_t>(pieces.size());
    Workspace<Cache> work(piece.unit->rows, a.head_dim);
    gather_queries(a, *piece.unit, work.queries);
    locate_chunk(a, *piece.unit, piece.chunk, work.places[0]);
    if (!ends) locate_chunk(a, *pieces[i + 1].unit, pieces[i + 1].chunk, work.places[1]);
    attend_chunk(a, *piece.unit, piece.chunk, work.places[0], ends ? nullptr : &work.places[1], work, piece.out);
  });
  for (const Unit& unit : units) {
    Workspace<Cache> work(unit.rows, a.head_dim);
    clear(work.total, unit.rows, a.head_dim);
    float* memory = partials + unit.first_partial;
    for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; ++chunk) {
      merge(work.total, partial_at(memory, unit.rows), unit.rows, a.head_dim);
      memory += partial_floats(unit.rows, a.head_dim);
    }
    write_out(a, unit, work.total);
  }
}

// Products of a query's and a key's or a value's elements, and about as much for transposing the keys.
int64_t amount_of_work(const std::vector<Unit>& units, int64_t head_dim) {
  int64_t work = 0;
  for (const Unit& unit : units) {
    work += (unit.end_chunk - unit.first_chunk) * kChunk * head_dim * (unit.rows + 4 * unit.num_heads);
  }
  return work;
}

template <class Cache>
void paged_attention(const Attention<Cache>& a, int64_t max_threads) {
  std::vector<Unit> units = list_units(a, max_threads);
  const int64_t num_threads = threads_for(amount_of_work(units, a.head_dim), kWorkPerThread, max_threads);
  const int64_t num_floats = place_partials(units, a.head_dim);
  const bool few = static_cast<int64_t>(units.size()) < kUnitsPerThread * num_threads;
  if (num_threads > 1 && few && num_floats <= kMaxSplitFloats) {
    thread_local AlignedBuffer partials;
    attend_split(a, units, partials.reserve(num_floats), num_threads);
  } else {
    attend_units(a, units, num_threads);
  }
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_paged_attention_f32(
    const float* q, int64_t q_token_stride, int64_t q_head_stride, const float* k, int64_t k_block_stride,
    int64_t k_slot_stride, int64_t k_head_stride, const float* v, int64_t v_block_stride, int64_t v_slot_stride,
    int64_t v_head_stride, const int32_t* block_tables, int64_t table_stride, const int32_t* query_starts,
    const int32_t* context_lens, const float* sinks, float* out, int64_t num_sequences, int64_t page_len,
    int64_t num_kv_heads, int64_t group, int64_t head_dim, float scale, int64_t window, float soft_cap,
    int64_t num_threads) {
  pilotfish::paged_attention<float>(
      {q, q_token_stride, q_head_stride,
       {k, k_block_stride, k_slot_stride, k_head_stride}, {v, v_block_stride, v_slot_stride, v_head_stride},
       page_len, num_kv_heads, group, head_dim, block_tables, table_stride, query_starts, context_lens, num_sequences,
       scale, window, soft_cap, sinks, out},
      num_threads);
}
