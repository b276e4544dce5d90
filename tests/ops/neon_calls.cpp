// Runs native kernels on calls that test_neon.py writes, for a processor that is emulated.
//
// Standard input: calls one after the other, each eight numbers of 64 bits (what to run, the
// format, rows, columns, rows of x, the number of values, which of bf16, fp16, fp32 and int8 they
// are, whether x is bf16) and then its arrays. Standard output: what each gives, in the dtype of x.
// kSet asks for a set instead and gives the best one, a byte each.
// Every array that is read ends where a page that may not be touched begins.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/coded.h"
#include "cpu/fisher_accumulate.h"
#include "cpu/gram.h"
#include "cpu/mask_topk.h"
#include "cpu/sparse_int8.h"
#include "cpu/sparse_linear.h"

using pyprune::DType;
using pyprune::TensorView;

namespace {

void read_exactly(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(2);
}

// The next `bytes` of the input, in memory of their own.
char* guarded(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t room = (bytes + page - 1) / page * page;
  void* memory =
      mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::exit(3);
  char* start = static_cast<char*>(memory);
  if (mprotect(start + room, page, PROT_NONE) != 0) std::exit(4);
  read_exactly(start + room - bytes, bytes);
  return start + room - bytes;
}

size_t size_of(DType type) {
  switch (type) {
    case DType::f32:
      return 4;
    case DType::i64:
      return 8;
    case DType::bf16:
    case DType::f16:
      return 2;
    default:
      return 1;
  }
}

TensorView view(void* data, DType type, std::vector<int64_t> shape) {
  TensorView t;
  t.data = data, t.dtype = type, t.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[i], t.stride[i] = stride;
    stride *= shape[i];
  }
  return t;
}

TensorView next(DType type, std::vector<int64_t> shape) {
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  return view(guarded(static_cast<size_t>(count) * size_of(type)), type, shape);
}

}  // namespace

int main() {
  enum Call { kProduct, kMaskTopk, kCoded, kSet, kGram, kFisher };
  struct {
    int64_t call, format, rows, cols, tokens, values, type, x_is_bf16;
  } h;
  while (std::fread(&h, sizeof h, 1, stdin) == 1) {
    const DType type = static_cast<DType>(h.type);
    if (h.call == kSet) {
      pyprune::isa_slot().store(static_cast<int>(h.format));
      std::putchar(static_cast<int>(pyprune::best_isa()));
      continue;
    }
    if (h.call == kMaskTopk) {
      const TensorView w = next(type, {h.rows, h.cols}), scale = next(DType::f32, {h.cols});
      std::vector<char> mask(static_cast<size_t>(h.rows * h.cols));
      pyprune::MaskTopkArgs args{view(mask.data(), DType::boolean, {h.rows, h.cols}), w, {}, 0, 2};
      args.terms.column_scale = scale;
      args.pruned = h.values;
      pyprune::mask_topk(args);
      std::fwrite(mask.data(), 1, mask.size(), stdout);
      continue;
    }
    if (h.call == kGram) {  // with a column of ones if the format says so
      const int64_t n = h.cols + h.format;
      std::vector<float> sums(static_cast<size_t>(n * n));
      const TensorView x = next(type, {1, h.tokens, h.cols}), weight = next(DType::f32, {1, h.tokens});
      pyprune::gram({view(sums.data(), DType::f32, {1, n, n}), x, &weight, 2});
      std::fwrite(sums.data(), 4, sums.size(), stdout);
      continue;
    }
    if (h.call == kFisher) {
      std::vector<float> sums(static_cast<size_t>(h.rows * h.cols));
      const TensorView g = next(type, {2, h.tokens, h.rows}), x = next(type, {2, h.tokens, h.cols});
      pyprune::fisher_accumulate(
          {view(sums.data(), DType::f32, {h.rows, h.cols}), g, x, 1, 1.0f, 2});
      std::fwrite(sums.data(), 4, sums.size(), stdout);
      continue;
    }
    const DType x_type = h.x_is_bf16 ? DType::bf16 : DType::f32;
    std::vector<char> y(static_cast<size_t>(h.tokens * h.rows) * size_of(x_type));
    const TensorView out = view(y.data(), x_type, {h.tokens, h.rows});
    const auto dense = pyprune::WeightFormat::dense;
    if (h.call == kCoded) {
      const TensorView low = next(DType::u8, {h.rows, h.cols});
      const TensorView codes = next(DType::u8, {h.rows, (h.cols + 7) / 8 * 3});
      const TensorView bases = next(DType::u8, {h.rows});
      const TensorView escapes = next(DType::u8, {h.values});
      const TensorView offsets = next(DType::i64, {h.rows + 1});
      const TensorView x = next(x_type, {h.tokens, h.cols});
      pyprune::linear_coded({{dense, out, x, h.rows, h.cols, low, nullptr, nullptr, nullptr, 2},
                             {low, codes, bases, escapes, offsets}});
      std::fwrite(y.data(), 1, y.size(), stdout);
      continue;
    }
    const auto format = static_cast<pyprune::WeightFormat>(h.format);
    const TensorView values = next(type, {h.values});
    TensorView meta, offsets;
    if (format == pyprune::WeightFormat::sparse24) meta = next(DType::u8, {h.rows, h.cols / 8});
    if (format == pyprune::WeightFormat::bitmap) {
      meta = next(DType::u8, {h.rows, (h.cols + 7) / 8});
      offsets = next(DType::i64, {h.rows + 1});
    }
    const TensorView x = next(x_type, {h.tokens, h.cols}), bias = next(DType::f32, {h.rows});
    const pyprune::SparseLinearArgs args{format,
                                         out,
                                         x,
                                         h.rows,
                                         h.cols,
                                         values,
                                         meta.data ? &meta : nullptr,
                                         offsets.data ? &offsets : nullptr,
                                         &bias,
                                         2};
    if (type == DType::i8) {
      const pyprune::SparseInt8Args scaled{args, next(DType::f32, {h.rows})};
      if (format == dense)
        pyprune::linear_int8(scaled);
      else
        pyprune::sparse_int8(scaled);
    } else {
      pyprune::sparse_linear(args);
    }
    std::fwrite(y.data(), 1, y.size(), stdout);
  }
  return 0;
}
