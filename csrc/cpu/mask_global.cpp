#include "cpu/mask_global.h"

#include <algorithm>

#include "cpu/cut.h"
#include "cpu/score.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// Elements per unit of work. Ties are counted by unit, so that each knows its share of them.
constexpr int64_t kChunk = 1 << 15;
// Bins of a narrowing pass (32 KiB of counters a thread), and the number of distinct keys from
// which on every chunk keeps counters of its own.
constexpr int64_t kBins = 4096, kFine = 64;
// With at most this many candidates left the next pass writes the mask of all others.
constexpr int64_t kFew = 1 << 15;
// Sample that brackets the wanted key: it puts some 5 % of the elements inside.
constexpr int64_t kSampleBlock = 16, kSampleBlocks = 1024;
constexpr int64_t kMinSampled = 1 << 18;

// Keys are made in pieces this long: 16 KiB of them stay in the first-level cache.
constexpr int64_t kPiece = 4096;

// A run of elements in flat order: whole rows of one tensor, or a part of one row.
struct Chunk {
  int64_t tensor, row0, row1, col0, col1;
};

// Cuts the tensors into chunks, computed from an index so that no list of them is held.
struct Chunking {
  const MaskGlobalArgs& args;
  Scratch<int64_t> first;  // index of each tensor's first chunk, then the total

  explicit Chunking(const MaskGlobalArgs& a) : args(a), first(a.count + 1) {
    first[0] = 0;
    for (int64_t t = 0; t < a.count; ++t) first[t + 1] = first[t] + chunks_of(t);
  }
  int64_t total() const { return first[args.count]; }
  int64_t rows(int64_t t) const { return args.tensors[t].w.shape[0]; }
  int64_t cols(int64_t t) const { return args.tensors[t].w.shape[1]; }
  int64_t rows_per_chunk(int64_t t) const {
    return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, cols(t)));
  }
  int64_t parts(int64_t t) const { return (cols(t) + kChunk - 1) / kChunk; }
  int64_t chunks_of(int64_t t) const {
    if (rows(t) == 0 || cols(t) == 0) return 0;
    return (rows(t) + rows_per_chunk(t) - 1) / rows_per_chunk(t) * parts(t);
  }
  Chunk at(int64_t index) const {
    int64_t t = 0, end = args.count;  // the last tensor whose first chunk is not after `index`
    while (end - t > 1) {
      const int64_t middle = t + (end - t) / 2;
      (first[middle] <= index ? t : end) = middle;
    }
    const int64_t local = index - first[t], step = rows_per_chunk(t);
    const int64_t row0 = local / parts(t) * step, col0 = local % parts(t) * kChunk;
    return {t, row0, std::min(rows(t), row0 + step), col0, std::min(cols(t), col0 + kChunk)};
  }
};

// Keys made from 16-bit weights alone have equal low bits: dropping them leaves few distinct keys,
// and one pass over the weights then finds the cut.
int dropped_bits(const MaskGlobalArgs& args) {
  int bits = 16;
  for (int64_t t = 0; t < args.count; ++t) {
    const GlobalTensor& g = args.tensors[t];
    const bool plain =
        !g.terms.column_scale.data && !g.terms.row_scale.data && !g.terms.addend.data;
    if (!plain || g.w.dtype == DType::f32) return 0;
    if (g.w.dtype == DType::f16) bits = 13;
  }
  return bits;
}

// Drops the low bits of the patterns, rounded up: NaN's stays above infinity's.
constexpr int32_t shortened(int32_t key, int drop) {
  return key == kForbiddenKey ? kForbiddenKey : (key + (1 << drop) - 1) >> drop;
}
inline void shorten(int32_t* keys, int64_t n, int drop) {
  if (drop == 0) return;
  for (int64_t i = 0; i < n; ++i) keys[i] = shortened(keys[i], drop);
}

// Calls f(keys, n, mask) for the pieces of a chunk, in order.
template <class T, class F>
void each_piece(const MaskGlobalArgs& args, const Chunk& c, int drop, int32_t* keys, F&& f) {
  const GlobalTensor& g = args.tensors[c.tensor];
  for (int64_t i = c.row0; i < c.row1; ++i) {
    const ScoreRow<T> row = score_row<T>(g.w, g.terms, i);
    uint8_t* mask = g.mask.ptr<uint8_t>() + i * g.w.shape[1];
    for (int64_t c0 = c.col0; c0 < c.col1; c0 += kPiece) {
      const int64_t c1 = std::min(c.col1, c0 + kPiece);
      score_keys(row, c0, c1, keys);
      shorten(keys, c1 - c0, drop);
      f(keys, c1 - c0, mask + c0);
    }
  }
}

// The search for the cut. The wanted key lies in [lo, hi]; each pass over the weights counts the
// keys below it and those in each of `bins` equal parts of it.
template <class T>
class Search {
 public:
  Search(const MaskGlobalArgs& args, int64_t elements)
      : args_(args),
        chunking_(args),
        drop_(dropped_bits(args)),
        max_key_(shortened(kMaxKey, drop_)),
        hi_(max_key_),
        buffers_((2 * (kPiece + kSlack)) * args.threads),
        counts_(kBins * args.threads),
        below_(args.threads),
        chunk_counts_(chunking_.total() * kFine) {
    if (elements >= kMinSampled) bracket(elements);
  }

  void run() {
    Cut cut{kForbiddenKey, 0};
    if (args_.pruned > 0) {
      while (!narrow())
        if (0 < inside_ && inside_ <= kFew) return write_all_but_few();
      cut = {lo_, args_.pruned - below_total_};
    }
    write(cut);
  }

 private:
  int32_t* keys_of(int thread) const { return buffers_.get() + 2 * (kPiece + kSlack) * thread; }

  // Sets [lo, hi] from blocks of elements spread evenly, shifted so that they do not line up with
  // the columns.
  void bracket(int64_t elements) {
    constexpr int64_t kSize = kSampleBlock * kSampleBlocks;
    const Scratch<int32_t> sample(3 * (kSize + kSlack));
    const int64_t stride = elements / kSampleBlocks;
    int64_t n = 0, t = 0, tensor_start = 0;
    for (int64_t b = 0; b < kSampleBlocks; ++b) {
      const int64_t flat = b * stride + b * 2654435761LL % (stride - kSampleBlock);
      while (flat >= tensor_start + chunking_.rows(t) * chunking_.cols(t))
        tensor_start += chunking_.rows(t) * chunking_.cols(t), ++t;
      const int64_t cols = chunking_.cols(t), i = (flat - tensor_start) / cols;
      const int64_t width = std::min(cols, kSampleBlock);
      const int64_t c = std::min((flat - tensor_start) % cols, cols - width);
      const GlobalTensor& g = args_.tensors[t];
      score_keys(score_row<T>(g.w, g.terms, i), c, c + width, sample.get() + n);
      n += width;
    }
    shorten(sample.get(), n, drop_);
    // Four standard deviations of the rank of an independent sample, doubled for the blocks.
    constexpr int64_t kMargin = 512;
    const int64_t at = static_cast<int64_t>(static_cast<double>(args_.pruned) / elements * n);
    int32_t* scratch = sample.get() + n + kSlack;
    if (at - kMargin >= 1) lo_ = find_cut(sample.get(), n, at - kMargin, scratch).key;
    if (at + kMargin <= n) hi_ = find_cut(sample.get(), n, at + kMargin, scratch).key;
  }

  // One pass. True once lo == hi is the cut's key and the ties of every chunk are counted.
  bool narrow() {
    const int64_t width = static_cast<int64_t>(hi_) - lo_ + 1;
    const bool fine = width <= kFine;
    int shift = 0;
    while (!fine && (width - 1) >> shift >= kBins) ++shift;
    count(shift, fine);
    inside_ = 0;
    int64_t below = 0;
    for (int t = 0; t < args_.threads; ++t) below += below_[t];
    if (args_.pruned <= below) {  // the sample misled
      hi_ = lo_ - 1;
      lo_ = kForbiddenKey;
      return false;
    }
    const int64_t bins = ((width - 1) >> shift) + 1;
    for (int64_t b = 0; b < bins; ++b) {
      int64_t in_bin = 0;
      for (int t = 0; t < args_.threads; ++t) in_bin += counts_[t * kBins + b];
      if (args_.pruned <= below + in_bin) {
        below_total_ = below;
        inside_ = in_bin;
        fine_bin_ = b;
        hi_ = static_cast<int32_t>(std::min<int64_t>(hi_, lo_ + ((b + 1) << shift) - 1));
        lo_ = static_cast<int32_t>(lo_ + (b << shift));
        return fine;
      }
      below += in_bin;
    }
    lo_ = hi_ + 1;  // above the bracket
    hi_ = max_key_;
    return false;
  }

  void count(int shift, bool fine) {
    const int64_t total = chunking_.total();
    std::memset(counts_.get(), 0, sizeof(int64_t) * kBins * args_.threads);
    std::memset(below_.get(), 0, sizeof(int64_t) * args_.threads);
#pragma omp parallel num_threads(args_.threads)
    {
      const int thread = thread_index();
      int32_t *const keys = keys_of(thread), *const inside = keys + kPiece + kSlack;
      int64_t* const bins = counts_.get() + thread * kBins;
      int64_t below = 0;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < total; ++i) {
        int32_t* const own = chunk_counts_.get() + i * kFine;
        if (fine) std::memset(own, 0, sizeof(int32_t) * kFine);
        each_piece<T>(args_, chunking_.at(i), drop_, keys,
                      [&](const int32_t* k, int64_t n, uint8_t*) {
                        const int64_t taken = gather_range(k, n, lo_, hi_, inside, below);
                        if (fine)
                          for (int64_t j = 0; j < taken; ++j) ++own[inside[j] - lo_];
                        else
                          for (int64_t j = 0; j < taken; ++j) ++bins[(inside[j] - lo_) >> shift];
                      });
        if (fine)
          for (int64_t b = 0; b < kFine; ++b) bins[b] += own[b];
      }
      below_[thread] = below;
    }
  }

  struct Candidate {
    int32_t key;
    uint8_t* keep;
  };

  // Writes the mask of all keys outside [lo, hi], then decides among the few inside.
  void write_all_but_few() {
    const Scratch<Candidate> found(inside_ * args_.threads);
    const Scratch<int64_t> taken(args_.threads);
    std::memset(taken.get(), 0, sizeof(int64_t) * args_.threads);
    const int64_t total = chunking_.total();
#pragma omp parallel num_threads(args_.threads)
    {
      const int thread = thread_index();
      Candidate* next = found.get() + inside_ * thread;
      // A static schedule: the threads' candidates one after another are in flat order.
#pragma omp for schedule(static)
      for (int64_t i = 0; i < total; ++i)
        each_piece<T>(args_, chunking_.at(i), drop_, keys_of(thread),
                      [&](const int32_t* k, int64_t n, uint8_t* mask) {
                        keep_above(k, n, hi_, mask, true);
                        each_within(k, n, lo_, hi_, [&](int64_t j) { *next++ = {k[j], mask + j}; });
                      });
      taken[thread] = next - (found.get() + inside_ * thread);
      finish_stores();
    }
    const Scratch<int32_t> keys(3 * (inside_ + kSlack));
    int64_t n = 0;
    for (int t = 0; t < args_.threads; ++t)
      for (int64_t j = 0; j < taken[t]; ++j) keys[n++] = found[inside_ * t + j].key;
    const Cut cut =
        find_cut(keys.get(), n, args_.pruned - below_total_, keys.get() + inside_ + kSlack);
    int64_t ties = cut.ties;
    for (int t = 0; t < args_.threads; ++t)
      for (int64_t j = 0; j < taken[t]; ++j) {
        const Candidate& c = found[inside_ * t + j];
        const bool tie = c.key == cut.key && ties > 0;
        ties -= tie;
        *c.keep = c.key >= cut.key && !tie && c.key != kForbiddenKey;
      }
  }

  // Every chunk prunes its share of the ties: all of them while the quota lasts.
  void write(Cut cut) {
    const int64_t total = chunking_.total();
    Scratch<int64_t> share(total);
    int64_t left = cut.ties;
    for (int64_t i = 0; i < total; ++i) {
      share[i] = left > 0 ? std::min<int64_t>(left, chunk_counts_[i * kFine + fine_bin_]) : 0;
      left -= share[i];
    }
#pragma omp parallel for num_threads(args_.threads) schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      int64_t ties = share[i];
      const bool partial = ties > 0 && ties < chunk_counts_[i * kFine + fine_bin_];
      each_piece<T>(args_, chunking_.at(i), drop_, keys_of(thread_index()),
                    [&](const int32_t* k, int64_t n, uint8_t* mask) {
                      // Away from the one chunk that the quota splits, a piece's ties go together.
                      write_mask(k, n, {cut.key, !partial && ties > 0 ? kAllTies : ties}, mask,
                                 true);
                      if (partial)
                        for (int64_t j = 0; j < n && ties > 0; ++j) ties -= k[j] == cut.key;
                    });
      finish_stores();
    }
  }

  const MaskGlobalArgs& args_;
  const Chunking chunking_;
  const int drop_;
  const int32_t max_key_;
  int32_t lo_ = kForbiddenKey, hi_;
  int64_t below_total_ = 0;  // keys below lo_, and
  int64_t inside_ = 0;       // those in [lo_, hi_], once a pass has found them
  int64_t fine_bin_ = 0;
  Scratch<int32_t> buffers_;
  Scratch<int64_t> counts_, below_;
  Scratch<int32_t> chunk_counts_;  // [chunks][kFine]
};

}  // namespace

void mask_global(const MaskGlobalArgs& args) {
  int64_t elements = 0;
  for (int64_t t = 0; t < args.count; ++t) elements += args.tensors[t].w.numel();
  if (elements == 0) return;
  with_float_type(args.tensors[0].w.dtype, [&](auto* tag) {
    Search<std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>>(args, elements).run();
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
