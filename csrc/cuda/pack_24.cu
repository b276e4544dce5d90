// A thread packs or unpacks eight columns at a time, two groups of four: one byte of metadata.
#include <cstdint>

#include "cuda/byte_permute.h"
#include "cuda/pack_24.h"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;
constexpr int kUnroll = 4;  // chunks that a thread has in flight

// Which two of a group are stored, by a bit for each column that is kept (low four) and for each
// that is a negative zero and not kept (high four): their indices ascending, two bits each.
constexpr uint32_t kOverfull = 16;  // more than two are kept

struct StoredTable {
  uint8_t entry[256];
};

constexpr StoredTable make_stored_table() {
  StoredTable table{};
  for (int pattern = 0; pattern < 256; ++pattern) {
    const int kept = pattern & 15, spare = pattern >> 4 & ~kept;
    const int padding[4] = {2, 3, 0, 1};
    int chosen = 0, count = 0;
    for (int turn = 0; turn < 12; ++turn) {
      const int i = turn < 8 ? turn % 4 : padding[turn - 8];
      const bool wanted = turn < 4 ? kept >> i & 1 : turn < 8 ? spare >> i & 1 : true;
      if (count < 2 && wanted && !(chosen >> i & 1)) {
        chosen |= 1 << i;
        ++count;
      }
    }
    int low = 0, high = 3;
    while (!(chosen >> low & 1)) ++low;
    while (!(chosen >> high & 1)) --high;
    const int kept_count = (kept & 1) + (kept >> 1 & 1) + (kept >> 2 & 1) + (kept >> 3);
    table.entry[pattern] = static_cast<uint8_t>(low | high << 2 | (kept_count > 2 ? kOverfull : 0));
  }
  return table;
}

__constant__ StoredTable stored_table = make_stored_table();

// A group of four as 32-bit words: two for 16-bit elements, else four.
template <class Bits>
constexpr int kGroupWords = sizeof(Bits);

// Bit i: element i is not +-0; bit 4 + i: it is -0.
__device__ inline uint32_t pattern_of(const uint32_t (&x)[2]) {
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t sign = 0x80008000u;
    const uint32_t kept = ((x[i] & ~sign) + ~sign) & sign;
    const uint32_t spare = x[i] & sign & ~kept;
    found |= kept >> (15 - 2 * i) | spare >> (11 - 2 * i);
  }
  return (found | found >> 15) & 255;  // the odd columns' bits are sixteen up, where even ones' are
}
__device__ inline uint32_t pattern_of(const uint32_t (&x)[4]) {
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (x[i] & 0x7fffffffu) found |= 1u << i;
    if (x[i] == 0x80000000u) found |= 16u << i;
  }
  return found;
}

// The same of four mask bytes; elements that are not kept become +0.
template <int kWords>
__device__ inline uint32_t apply_mask(uint32_t bytes, uint32_t (&x)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (kWords == 2)
      x[i] &= permute_bytes(bytes, 0, i ? 0x4342 : 0x4140) * 0xffffu;
    else
      x[i] = bytes >> (8 * i) & 1 ? x[i] : 0;
  }
  return bytes * 0x01020408u >> 24 & 15;
}

// Elements `low` and `high` of a group.
__device__ inline void pick(const uint32_t (&x)[2], uint32_t low, uint32_t high,
                            uint32_t (&values)[1]) {
  values[0] = permute_bytes(x[0], x[1], 0x1010 + low * 0x22 + high * 0x2200);
}
__device__ inline void pick(const uint32_t (&x)[4], uint32_t low, uint32_t high,
                            uint32_t (&values)[2]) {
  values[0] = low & 2 ? (low & 1 ? x[3] : x[2]) : (low & 1 ? x[1] : x[0]);
  values[1] = high & 2 ? (high & 1 ? x[3] : x[2]) : (high & 1 ? x[1] : x[0]);
}

template <int kWords>
__device__ inline void load_words(const void* at, uint32_t (&x)[kWords]) {
  if constexpr (kWords == 2) {
    const uint2 two = __ldcs(static_cast<const uint2*>(at));
    x[0] = two.x;
    x[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 four = __ldcs(static_cast<const uint4*>(at) + i);
      x[4 * i] = four.x;
      x[4 * i + 1] = four.y;
      x[4 * i + 2] = four.z;
      x[4 * i + 3] = four.w;
    }
  }
}

template <int kWords>
__device__ inline void store_words(void* at, const uint32_t (&x)[kWords]) {
  if constexpr (kWords == 2) {
    __stcs(static_cast<uint2*>(at), make_uint2(x[0], x[1]));
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i)
      __stcs(static_cast<uint4*>(at) + i,
             make_uint4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]));
  }
}

struct Problem {
  uint8_t *values, *meta, *w;
  const uint8_t* mask;
  unsigned long long* overfull;  // -1 is its highest value
  int64_t chunks, per_row, row_bytes;
};

template <class Bits, bool kMask>
__global__ void __launch_bounds__(kThreads) pack_24_kernel(Problem p) {
  constexpr int kWords = kGroupWords<Bits>, kBytes = kChunk * sizeof(Bits);
  __shared__ uint32_t table[256 / 4];
  if (threadIdx.x < 256 / 4)
    table[threadIdx.x] = reinterpret_cast<const uint32_t*>(stored_table.entry)[threadIdx.x];
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  uint32_t x[kUnroll][2 * kWords];
  uint32_t kept[kUnroll][2] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t chunk = first + u * kThreads;
    if (chunk >= p.chunks) break;
    int64_t at = chunk * kBytes;
    if (p.row_bytes != p.per_row * kBytes)
      at = chunk / p.per_row * p.row_bytes + chunk % p.per_row * kBytes;
    load_words(p.w + at, x[u]);
    if constexpr (kMask) load_words(p.mask + chunk * kChunk, kept[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t chunk = first + u * kThreads;
    if (chunk >= p.chunks) break;
    uint32_t values[kWords], meta = 0;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      uint32_t group[kWords], two[kWords / 2], pattern;
#pragma unroll
      for (int i = 0; i < kWords; ++i) group[i] = x[u][g * kWords + i];
      if constexpr (kMask)
        pattern = apply_mask(kept[u][g], group);
      else
        pattern = pattern_of(group);
      const uint32_t entry = reinterpret_cast<const uint8_t*>(table)[pattern];
      pick(group, entry & 3, entry >> 2 & 3, two);
#pragma unroll
      for (int i = 0; i < kWords / 2; ++i) values[g * kWords / 2 + i] = two[i];
      meta |= (entry & 15) << (4 * g);
      if (entry & kOverfull) atomicMin(p.overfull, static_cast<unsigned long long>(2 * chunk + g));
    }
    store_words(p.values + chunk * (kBytes / 2), values);
    p.meta[chunk] = static_cast<uint8_t>(meta);
  }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) unpack_24_kernel(Problem p) {
  constexpr int kWords = kGroupWords<Bits>, kBytes = kChunk * sizeof(Bits);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  uint32_t values[kUnroll][kWords], meta[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t chunk = first + u * kThreads;
    if (chunk >= p.chunks) break;
    load_words(p.values + chunk * (kBytes / 2), values[u]);
    meta[u] = __ldg(p.meta + chunk);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t chunk = first + u * kThreads;
    if (chunk >= p.chunks) break;
    uint32_t x[2 * kWords];
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t nibble = meta[u] >> (4 * g);
      const uint32_t low = nibble & 3, high = nibble >> 2 & 3;
      if constexpr (sizeof(Bits) == 2) {
        // A byte of the selector for each element: 0x10 and 0x32 take the first and the second
        // value, 0x44 a zero of the other operand.
        const uint32_t selector = 0x44444444u ^ 0x54u << (8 * low) ^ 0x76u << (8 * high);
        x[2 * g] = permute_bytes(values[u][g], 0, selector);
        x[2 * g + 1] = permute_bytes(values[u][g], 0, selector >> 16);
      } else {
        const uint32_t a = values[u][2 * g], b = values[u][2 * g + 1];
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) x[4 * g + i] = i == low ? a : i == high ? b : 0;
      }
    }
    store_words(p.w + chunk * kBytes, x);
  }
}

Problem problem_of(const Pack24Cuda& args) {
  const int64_t size = args.w.dtype == DType::f32 ? 4 : 2;
  const int64_t per_row = args.w.shape[1] / kChunk;
  return {args.values.ptr<uint8_t>(),
          args.meta.ptr<uint8_t>(),
          args.w.ptr<uint8_t>(),
          args.mask.ptr<uint8_t>(),
          args.overfull.ptr<unsigned long long>(),
          args.w.shape[0] * per_row,
          per_row,
          args.w.shape[0] > 1 ? args.w.stride[0] * size : per_row * kChunk * size};
}

unsigned blocks_of(const Problem& p) {
  constexpr int64_t kChunks = int64_t{kThreads} * kUnroll;
  return static_cast<unsigned>((p.chunks + kChunks - 1) / kChunks);
}

}  // namespace

cudaError_t launch_pack_24(const Pack24Cuda& args, cudaStream_t stream) {
  const Problem p = problem_of(args);
  const cudaError_t status = cudaMemsetAsync(p.overfull, 0xff, sizeof(*p.overfull), stream);
  if (status != cudaSuccess) return status;
  const unsigned blocks = blocks_of(p);
  if (args.w.dtype == DType::f32) {
    if (p.mask)
      pack_24_kernel<uint32_t, true><<<blocks, kThreads, 0, stream>>>(p);
    else
      pack_24_kernel<uint32_t, false><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    if (p.mask)
      pack_24_kernel<uint16_t, true><<<blocks, kThreads, 0, stream>>>(p);
    else
      pack_24_kernel<uint16_t, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t launch_unpack_24(const Pack24Cuda& args, cudaStream_t stream) {
  const Problem p = problem_of(args);
  if (args.w.dtype == DType::f32)
    unpack_24_kernel<uint32_t><<<blocks_of(p), kThreads, 0, stream>>>(p);
  else
    unpack_24_kernel<uint16_t><<<blocks_of(p), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace pyprune
