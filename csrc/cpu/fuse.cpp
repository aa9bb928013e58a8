// Stage `fuse`: one read of x, one write of y. y = x + offset + gate + s(stencil) + s(conv), and its relatives
// (stages.h, Mode).
//
// A group of blocks goes through three steps that stay in the second-level cache (frames: 0.3 MB a thread): windows to
// transformed inputs, a product per point, products back to pixels with the sigmoids and the sum.
#include "block.h"

namespace soap::cpu::SOAP_ISA_NS {
namespace {

struct Buffers { float *V, *M, *mean, *prior, *stencil; };

Buffers buffers_of(const Plan& p, float* scratch) {
  Buffers b;
  b.V = scratch;
  b.M = b.V + p.blocks * p.v_block;
  b.mean = b.M + p.blocks * p.m_block;
  b.prior = b.mean + p.blocks * p.mean_block;
  b.stencil = b.prior + static_cast<int64_t>(p.blocks) * p.slots * POSITIONS * L;
  return b;
}

enum class Store { general, plain, stream };

// The last step for one output plane of a block. M: its products, null without a conv; prior: its slot's, or null.
template <bool Strict, bool Linear>
SOAP_INLINE void finish_plane(const Fuse& f, int64_t clip, int plane, const Block& b, const float* M,
    const float* prior, bool base_in_place, Store store) {
  alignas(64) float pixels[4][TILE * STAGE];
  alignas(64) float out[4][TILE * L];
  v z[TILE][TILE];
  if (M) {
    points_to_positions<Strict>(M, z);
    if (!Linear) {
      SOAP_UNROLL(16)
      for (int k = 0; k < POSITIONS; ++k) z[k / 4][k % 4] = sigmoid2_of_finite(z[k / 4][k % 4]);
    }
  } else {
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) z[k / 4][k % 4] = set1(0.f);
  }
  if (prior) {
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) z[k / 4][k % 4] = z[k / 4][k % 4] + ld(prior + k * L);
  }
  const bool multiply = f.mode == Mode::multiplicative;
  const v gate = set1((f.gate ? f.gate[clip * f.shape.planes() + plane] : 0.f) + f.offset);
  SOAP_UNROLL(4)
  for (int k = 0; k < TILE; ++k) {
    transpose4(z[k][0], z[k][1], z[k][2], z[k][3]);  // now by segment: row k of 4 segments
    SOAP_UNROLL(4)
    for (int s = 0; s < 4; ++s) z[k][s] = z[k][s] + gate;
  }
  float* y = static_cast<float*>(f.y.data) + clip * f.y.clip + f.y.plane[plane];
  SOAP_UNROLL(4)
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    const Rows x = own_rows(f.base, base_in_place, clip, plane, b, s, pixels[s]);
    const bool whole = g.rows == TILE && g.cols == L;
    float* row = y + g.row * f.y.row + g.col;
    SOAP_UNROLL(4)
    for (int k = 0; k < TILE; ++k) {
      const v p = ld(x.first + k * x.apart);
      const v r = multiply ? p * z[k][s] : p + z[k][s];
      if (store == Store::general || !whole) {
        st(out[s] + k * L, r);
      } else if (store == Store::stream) {
        stream(row + k * f.y.row, r);
      } else {
        st(row + k * f.y.row, r);
      }
    }
    if (store == Store::general || !whole) write(f.y, clip, plane, g, out[s]);
  }
}

template <bool Strict, bool Linear>
__attribute__((noinline)) void finish_block(
    const Fuse& f, const Plan& plan, int group, int64_t clip, const Block& b, const float* M, const float* prior) {
  const int first = group * plan.group, planes = f.shape.planes();
  const int last = plan.outputs ? (first + plan.group < planes ? first + plan.group : planes) : planes;
  const bool base_in_place = loads_in_place(f.base);
  const bool flat = f.y.dtype == Dtype::f32 && f.y.col == 1;
  // Stores past the cache where every row starts on a vector's boundary: y is not read again here.
  const bool aligned = flat && (reinterpret_cast<uintptr_t>(f.y.data) % sizeof(v) == 0) && f.y.row % L == 0 &&
                       f.y.clip % L == 0 && f.shape.pixels() % L == 0 && f.y.plane[0] % L == 0;
  const Store store = aligned ? Store::stream : flat ? Store::plain : Store::general;
  for (int plane = first; plane < last; ++plane) {
    if (base_in_place && plane + 1 < last) fetch_near<TILE>(f.base, clip, plane + 1, b, 0);
    const int slot = plane / f.shape.channels;
    finish_plane<Strict, Linear>(f, clip, plane, b, plan.outputs ? M + (plane - first) * plan.m_step : nullptr,
        plan.slots ? prior + slot * POSITIONS * L : nullptr, base_in_place, store);
  }
}

template <bool Strict, bool Linear>
void fuse_blocks(const Fuse& f, int64_t clip, int64_t first, int64_t last, float* scratch) {
  const Plan plan = plan_of(f);
  const Buffers buf = buffers_of(plan, scratch);
  const int H = f.shape.height, W = f.shape.width;
  const Blocks grid = block_grid(H, W);
  const int groups = plan.outputs ? (plan.outputs + plan.group - 1) / plan.group : 1;
  const int64_t prior_block = static_cast<int64_t>(plan.slots) * POSITIONS * L;
  Block block[8];
  for (int64_t q = first; q < last; q += plan.blocks) {
    const int n = static_cast<int>(last - q < plan.blocks ? last - q : plan.blocks);
    for (int k = 0; k < n; ++k) {
      locate(grid, q + k, H, W, block[k]);
      load_block<Strict>(f, plan, clip, block[k], buf.V + k * plan.v_block, buf.mean + k * plan.mean_block);
      if (plan.slots) priors<Strict>(f, plan, buf.mean + k * plan.mean_block, buf.stencil, buf.prior + k * prior_block);
    }
    const Ahead ahead = plan.outputs ? look_ahead(f.x, clip, grid, q + n, last, H, W, -1, WINDOW) : Ahead{};
    for (int g = 0; g < groups; ++g) {
      if (plan.outputs) {
        for (int k = 0; k < n; k += 2) {
          const float* V = buf.V + k * plan.v_block;
          float* M = buf.M + k * plan.m_block;
          if (k + 1 < n)
            products<Strict, 2>(f.conv, plan, g, V, V + plan.v_block, M, M + plan.m_block, k + g ? Ahead{} : ahead, {});
          else products<Strict, 1>(f.conv, plan, g, V, V, M, M, k + g ? Ahead{} : ahead, {});
        }
      }
      for (int k = 0; k < n; ++k)
        finish_block<Strict, Linear>(f, plan, g, clip, block[k], buf.M + k * plan.m_block, buf.prior + k * prior_block);
    }
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

size_t fuse_scratch(const Fuse& f) {
  const Plan p = plan_of(f);
  return static_cast<size_t>(p.blocks * (p.v_block + p.m_block + p.mean_block + p.slots * POSITIONS * L) + p.m_step);
}

void fuse(const Fuse& f, int64_t clip, int64_t first, int64_t last, float* scratch) {
  if (f.mode == Mode::linear)
    f.conv.strict ? fuse_blocks<true, true>(f, clip, first, last, scratch)
                  : fuse_blocks<false, true>(f, clip, first, last, scratch);
  else
    f.conv.strict ? fuse_blocks<true, false>(f, clip, first, last, scratch)
                  : fuse_blocks<false, false>(f, clip, first, last, scratch);
}

}  // namespace soap::cpu::SOAP_ISA_NS
