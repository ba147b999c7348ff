// Linear layer with int8 weights and activations quantized row by row on the way in. x86-64 with AVX512-VNNI, AMX optional.
//
// M rows, K inputs, N outputs; KP is K rounded up to 64. Weights are packed [N/16][KP/4][16][4]: four neighbouring inputs of
// 16 outputs in one 64-byte line, which is both the operand of vpdpbusd and a row of an AMX tile.
// y[m,n] = row_scale[m] * weight_scale[n] * (sum_k code[m,k] * w[n,k] - zero_point[m] * weight_sum[n]) + bias[n], through GELU when asked

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

namespace {

constexpr float kTiny = 1e-30f;
constexpr int64_t kLanes = 16;

struct Problem {
  int64_t M, N, K, KP;
  const int8_t* weight;
  const float* weight_scale;
  const int32_t* weight_sum;
  const float* bias;  // may be null
  bool symmetric;
  bool gelu;
  bool amx;
};

// One thread's quantized rows.
struct Rows {
  uint8_t* code;  // [m, KP]
  float* scale;
  int32_t* zero_point;
};

inline __mmask16 tail_mask(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1); }

inline __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline __m512 load16(const at::BFloat16* p, __mmask16 m) {
  const __m256i half = _mm256_maskz_loadu_epi16(m, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store16(float* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
inline void store16(at::BFloat16* p, __mmask16 m, __m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(rounded));
}

// Codes 0..255 with a zero point; symmetric codes are 128 + round(x / scale). A row that holds a NaN gets a NaN scale.
template <typename T>
void quantize_row(const T* x, int64_t K, int64_t KP, bool symmetric, uint8_t* code, float* scale, int32_t* zero_point) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = 0; k < K; k += kLanes) {
    const __m512 v = load16(x + k, tail_mask(K - k));
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
  }
  const float lo = _mm512_reduce_min_ps(low), hi = _mm512_reduce_max_ps(high);
  const float width = std::max(symmetric ? std::max(-lo, hi) : hi - lo, kTiny);
  const float steps = symmetric ? 127.0f : 255.0f;
  const float inverse = steps / width;
  const __m512i zero = symmetric ? _mm512_set1_epi32(128) : _mm512_cvtps_epi32(_mm512_set1_ps(-lo * inverse));
  *scale = nan ? std::numeric_limits<float>::quiet_NaN() : width / steps;
  *zero_point = _mm512_cvtsi512_si32(zero);
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i bottom = _mm512_setzero_si512(), top = _mm512_set1_epi32(255);
  for (int64_t k = 0; k < KP; k += kLanes) {
    const __m512 v = k < K ? load16(x + k, tail_mask(K - k)) : _mm512_setzero_ps();
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor)), zero);
    q = _mm512_min_epi32(_mm512_max_epi32(q, bottom), top);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(code + k), _mm512_cvtepi32_epi8(q));
  }
}

// exp(v) for v <= 0, by 2^n * 2^f with a polynomial of degree 6 for 2^f: relative error below 2e-7 in float32.
inline __m512 exp_of_negative(__m512 v) {
  const __m512 t = _mm512_mul_ps(_mm512_max_ps(v, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 y = _mm512_set1_ps(1.54035304e-4f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.33335581e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61812911e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55041087e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40226507e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147181e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// x * Phi(x). erf by Abramowitz and Stegun 7.1.26: absolute error of erf below 1.5e-7.
inline __m512 gelu(__m512 x) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 y = _mm512_set1_ps(1.061405429f);
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
  // tail = 1 - erf(z); Phi(x) is tail / 2 on the left and 1 - tail / 2 on the right.
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(y, t), exp_of_negative(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), z)));
  const __m512 half = _mm512_mul_ps(tail, _mm512_set1_ps(0.5f));
  const __mmask16 right = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(half, right, one, half));
}

template <typename T>
inline void write16(const Problem& p, const Rows& rows, int64_t m, int64_t n, __m512i sum, T* out) {
  const __mmask16 mask = tail_mask(p.N - n);
  const __m512i correction = _mm512_mullo_epi32(_mm512_loadu_si512(p.weight_sum + n), _mm512_set1_epi32(rows.zero_point[m]));
  const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(p.weight_scale + n), _mm512_set1_ps(rows.scale[m]));
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, correction)), scale);
  if (p.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.bias + n));
  if (p.gelu) y = gelu(y);
  store16(out + n, mask, y);
}

// MR rows by NR * 16 outputs, sums in registers.
template <typename T, int MR, int NR>
void vnni_tile(const Problem& p, const Rows& rows, int64_t m, int64_t block, T* out) {
  __m512i sum[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_setzero_si512();
  const int64_t stride = p.KP * kLanes;
  const int8_t* w = p.weight + block * stride;
  const uint8_t* a = rows.code + m * p.KP;
  for (int64_t k = 0; k < p.KP; k += 4) {
    __m512i b[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) b[j] = _mm512_loadu_si512(w + j * stride + k * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      int32_t four;
      std::memcpy(&four, a + i * p.KP + k, 4);
      const __m512i av = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], av, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) write16(p, rows, m + i, (block + j) * kLanes, sum[i][j], out + (m + i) * p.N);
}

template <typename T, int NR>
void vnni_rows(const Problem& p, const Rows& rows, int64_t num_rows, int64_t block, T* out) {
  int64_t m = 0;
  for (; m + 6 <= num_rows; m += 6) vnni_tile<T, 6, NR>(p, rows, m, block, out);
  switch (num_rows - m) {
    case 5: vnni_tile<T, 5, NR>(p, rows, m, block, out); break;
    case 4: vnni_tile<T, 4, NR>(p, rows, m, block, out); break;
    case 3: vnni_tile<T, 3, NR>(p, rows, m, block, out); break;
    case 2: vnni_tile<T, 2, NR>(p, rows, m, block, out); break;
    case 1: vnni_tile<T, 1, NR>(p, rows, m, block, out); break;
    default: break;
  }
}

template <typename T>
void vnni_blocks(const Problem& p, const Rows& rows, int64_t num_rows, int64_t first, int64_t last, T* out) {
  int64_t block = first;
  for (; block + 4 <= last; block += 4) vnni_rows<T, 4>(p, rows, num_rows, block, out);
  switch (last - block) {
    case 3: vnni_rows<T, 3>(p, rows, num_rows, block, out); break;
    case 2: vnni_rows<T, 2>(p, rows, num_rows, block, out); break;
    case 1: vnni_rows<T, 1>(p, rows, num_rows, block, out); break;
    default: break;
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

template <typename T>
void amx_write(const Problem& p, const Rows& rows, int64_t m, int64_t num_rows, int64_t block, const int32_t* sums, T* out) {
  const int64_t count = std::min<int64_t>(16, num_rows - m);
  for (int64_t i = 0; i < count; ++i)
    write16(p, rows, m + i, block * kLanes, _mm512_load_si512(sums + i * 16), out + (m + i) * p.N);
}

// 32 rows by 32 outputs in four tiles. Rows are padded to a multiple of 16 by the caller.
template <typename T>
void amx_blocks(const Problem& p, const Rows& rows, int64_t num_rows, int64_t first, int64_t last, T* out) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
  alignas(64) int32_t sums[4][256];
  const int64_t stride = p.KP * kLanes;
  for (int64_t block = first; block < last; block += 2) {
    const bool two_blocks = block + 1 < last;
    const int8_t* w0 = p.weight + block * stride;
    const int8_t* w1 = two_blocks ? w0 + stride : w0;
    for (int64_t m = 0; m < num_rows; m += 32) {
      const bool two_rows = m + 16 < num_rows;
      const uint8_t* a0 = rows.code + m * p.KP;
      const uint8_t* a1 = two_rows ? a0 + 16 * p.KP : a0;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < p.KP; k += 64) {
        _tile_loadd(4, a0 + k, p.KP);
        _tile_loadd(6, w0 + k * kLanes, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, w1 + k * kLanes, 64);
        _tile_dpbusd(1, 4, 7);
        if (two_rows) {
          _tile_loadd(5, a1 + k, p.KP);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
      }
      _tile_stored(0, sums[0], 64);
      amx_write(p, rows, m, num_rows, block, sums[0], out);
      if (two_blocks) {
        _tile_stored(1, sums[1], 64);
        amx_write(p, rows, m, num_rows, block + 1, sums[1], out);
      }
      if (!two_rows) continue;
      _tile_stored(2, sums[2], 64);
      amx_write(p, rows, m + 16, num_rows, block, sums[2], out);
      if (two_blocks) {
        _tile_stored(3, sums[3], 64);
        amx_write(p, rows, m + 16, num_rows, block + 1, sums[3], out);
      }
    }
  }
  _tile_release();
}

// Quantizes rows [m0, m1) and multiplies them with blocks [b0, b1), a few rows at a time so that their codes stay in cache.
template <typename T>
void run(const Problem& p, const T* x, T* out, int64_t m0, int64_t m1, int64_t b0, int64_t b1) {
  constexpr int64_t kStep = 192;
  const int64_t step = std::min(kStep, (m1 - m0 + 15) / 16 * 16);
  std::unique_ptr<uint8_t[]> code(new uint8_t[step * p.KP]);
  float scale[kStep];
  int32_t zero_point[kStep];
  const Rows rows{code.get(), scale, zero_point};
  for (int64_t m = m0; m < m1; m += step) {
    const int64_t count = std::min(step, m1 - m);
    for (int64_t i = 0; i < count; ++i)
      quantize_row(x + (m + i) * p.K, p.K, p.KP, p.symmetric, code.get() + i * p.KP, scale + i, zero_point + i);
    if (p.amx) {
      std::memset(code.get() + count * p.KP, 0, (step - count) * p.KP);
      amx_blocks(p, rows, count, b0, b1, out + m * p.N);
    } else {
      vnni_blocks(p, rows, count, b0, b1, out + m * p.N);
    }
  }
}

template <typename T>
void launch(const Problem& p, const T* x, T* out) {
  const int64_t blocks = (p.N + kLanes - 1) / kLanes;
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
  // Rows first: a thread that owns rows quantizes them once. Few rows: split the outputs instead.
  const int64_t over_rows = std::clamp<int64_t>(p.M / 32, 1, threads);
  const int64_t over_blocks = std::clamp<int64_t>(threads / over_rows, 1, (blocks + 1) / 2);
  const int64_t rows_each = (p.M + over_rows - 1) / over_rows;
  const int64_t pairs = (blocks + 1) / 2, pairs_each = (pairs + over_blocks - 1) / over_blocks;
  at::parallel_for(0, over_rows * over_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m0 = task / over_blocks * rows_each, m1 = std::min(p.M, m0 + rows_each);
      const int64_t b0 = task % over_blocks * pairs_each * 2, b1 = std::min(blocks, b0 + pairs_each * 2);
      if (m0 < m1 && b0 < b1) run(p, x, out, m0, m1, b0, b1);
    }
  });
}

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale, const at::Tensor& weight_sum,
                       const std::optional<at::Tensor>& bias, int64_t out_features, bool symmetric, bool gelu, bool amx) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 16 && weight.size(3) == 4 && weight.is_contiguous(),
                    "weight must be packed [N/16, K/4, 16, 4]");
  const int64_t K = x.size(-1), KP = weight.size(1) * 4, blocks = weight.size(0);
  TORCH_CHECK_VALUE(KP % 64 == 0 && K <= KP && K > KP - 64, "x has ", K, " inputs, the packed weight holds ", KP);
  TORCH_CHECK_VALUE(out_features <= blocks * 16 && out_features > (blocks - 1) * 16, "out_features does not fit the packed weight");
  TORCH_CHECK_VALUE(weight_scale.numel() == blocks * 16 && weight_sum.numel() == blocks * 16, "scale and sum must be padded like the weight");
  const at::Tensor rows = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t M = K ? x.numel() / K : 0;
  if (M == 0) return out;
  const Problem p{M, out_features, K, KP, weight.const_data_ptr<int8_t>(), weight_scale.const_data_ptr<float>(),
                  weight_sum.const_data_ptr<int32_t>(), bias ? bias->const_data_ptr<float>() : nullptr, symmetric, gelu, amx};
  if (x.scalar_type() == at::kFloat) {
    launch(p, rows.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  } else {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, "x must be float32 or bfloat16");
    launch(p, rows.const_data_ptr<at::BFloat16>(), out.mutable_data_ptr<at::BFloat16>());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kernel_pytorch, m) {
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor? bias, int out_features, bool symmetric, "
      "bool gelu, bool amx) -> Tensor");
}

TORCH_LIBRARY_IMPL(kernel_pytorch, CPU, m) { m.impl("int8_linear", int8_linear); }
