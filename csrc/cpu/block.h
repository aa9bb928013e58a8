// What fuse and sweep have in common: a block's inputs as points, and the products with the weights.
//
// Scratch of one thread, for the blocks that go through a product together, in vectors of L tiles (pixels.h):
//
//     V[block][point][input]   transformed inputs      mean[block][point][slot]   their means over channels (stencil)
//     M[block][output][point]  products of a group of outputs
#pragma once

#include "transform.h"

namespace soap::cpu::SOAP_ISA_NS {

constexpr int GROUP_OUTPUTS = 96;  // of many outputs, so many share one read of the transformed inputs
// A vector's stride between points or outputs is odd, so that the sets of the caches are used evenly.

SOAP_INLINE int round_up(int n, int m) { return (n + m - 1) / m * m; }
SOAP_INLINE int input_stride(int inputs) { return round_up(inputs, 12) + 1; }
SOAP_INLINE int group_outputs(int outputs) {
  const int padded = round_up(outputs, OUTPUTS);
  return padded < GROUP_OUTPUTS ? padded : GROUP_OUTPUTS;
}
// Blocks that go through a product together. Two share each broadcast weight; those of many inputs outgrow the cache
// and are worth reading once for more.
SOAP_INLINE int group_blocks(int inputs) { return inputs <= 128 ? 2 : 8; }

struct Plan {
  int inputs, outputs, slots;  // planes read by conv, its outputs, slots of the stencil (0: none)
  bool strict;
  int points;         // products kept per output
  int group, blocks;  // outputs and blocks that go through a product together
  // Floats from point to point of V and mean and from output to output of M (_step), and from block to block.
  int64_t v_step, v_block, m_step, m_block, mean_step, mean_block;
};

SOAP_INLINE Plan plan_of(const Fuse& f) {
  Plan p;
  p.inputs = f.conv.outputs ? f.conv.inputs : 0;
  p.outputs = f.conv.outputs;
  p.slots = f.stencil.weight ? f.shape.frames : 0;
  p.strict = f.conv.strict;
  p.points = points_of(p.strict);
  p.group = p.outputs ? group_outputs(p.outputs) : 0;
  p.blocks = group_blocks(p.inputs);
  p.v_step = p.inputs ? static_cast<int64_t>(input_stride(p.inputs)) * L : 0;
  p.v_block = POINTS * p.v_step;
  p.m_step = static_cast<int64_t>(p.points + 1) * L;
  p.m_block = p.group * p.m_step;
  p.mean_step = static_cast<int64_t>(p.slots) * L;
  p.mean_block = POINTS * p.mean_step;
  return p;
}

SOAP_INLINE int stencil_plane(const Fuse& f, int slot, int c) {
  return f.stencil.interleaved ? c * f.shape.frames + slot : slot * f.shape.channels + c;
}

// Both transforms are linear: the mean of transformed planes is the mean's transform. V: the slot's first plane.
SOAP_INLINE void slot_mean(const Plan& plan, const float* V, int channels, int channel, float* mean) {
  for (int point = 0; point < POINTS; ++point, V += plan.v_step, mean += plan.mean_step) {
    if (channels == 3) {
      st(mean, ld(V) + ld(V + channel) + ld(V + 2 * channel));
      continue;
    }
    v m = ld(V);
    for (int c = 1; c < channels; ++c) m = m + ld(V + c * channel);
    st(mean, m);
  }
}

// Inputs of one block for the conv, and the slots' means where each slot's planes are neighbours.
template <bool Strict>
SOAP_INLINE void load_inputs(const Fuse& f, const Plan& plan, int64_t clip, const Block& b, float* V, float* mean) {
  alignas(64) float buffer[4 * WINDOW * STAGE];
  const int C = f.shape.channels;
  bool inner = true;
  for (const Segment& g : b.segment) inner &= g.inner;
  const bool in_place = loads_in_place(f.x), masked = in_place && !inner && MASKED_LOADS;
  const Inside in = inside_of(b);
  Windows w;
  for (int i = 0; i < plan.inputs; ++i) {
    if (masked) {
      windows_to_mask(f.x, clip, i, b, w);
      window_to_points<Strict, true>(w, in, V + i * L, plan.v_step);
    } else {
      if (in_place && inner && i + 1 < plan.inputs) fetch_near<WINDOW>(f.x, clip, i + 1, b, -1);
      windows_of(f.x, in_place, clip, i, b, buffer, w);
      window_to_points<Strict, false>(w, in, V + i * L, plan.v_step);
    }
    // A slot's planes are summed while they are in the first-level cache.
    if (plan.slots && !f.stencil.interleaved && i % C == C - 1)
      slot_mean(plan, V + (i - C + 1) * L, C, L, mean + i / C * L);
  }
}

// Adds windows to `total` (4 x 6 x STAGE), or sets it to them.
SOAP_INLINE void add_windows(const Windows& w, bool first, float* total) {
  for (int s = 0; s < 4; ++s)
    for (int k = 0; k < WINDOW; ++k, total += STAGE) {  // L + 4 pixels: a vector, and the last 4 of one 4 further
      const float* row = w.first[s] + k * w.apart[s];
      const v head = ld(row);
      st(total, first ? head : ld(total) + head);
      alignas(64) float tail[L];
      st(tail, ld(row + 4));
      for (int q = 0; q < 4; ++q) total[L + q] = first ? tail[L - 4 + q] : total[L + q] + tail[L - 4 + q];
    }
}

// Without a conv: the slots' planes are added up as pixels, so that T windows are transformed instead of T C.
template <bool Strict>
SOAP_INLINE void load_slots(const Fuse& f, const Plan& plan, int64_t clip, const Block& b, float* mean) {
  alignas(64) float buffer[4 * WINDOW * STAGE];
  alignas(64) float total[4 * WINDOW * STAGE];
  Windows w, totals;
  for (int s = 0; s < 4; ++s) totals.first[s] = total + s * WINDOW * STAGE, totals.apart[s] = STAGE;
  for (int t = 0; t < plan.slots; ++t) {
    for (int c = 0; c < f.shape.channels; ++c) {
      windows_of(f.x, loads_in_place(f.x), clip, stencil_plane(f, t, c), b, buffer, w);
      add_windows(w, c == 0, total);
    }
    window_to_points<Strict, false>(totals, Inside{}, mean + t * L, plan.mean_step);
  }
}

// Inputs of one block: V for the conv, means for the stencil.
template <bool Strict>
static __attribute__((noinline)) void load_block(
    const Fuse& f, const Plan& plan, int64_t clip, const Block& b, float* V, float* mean) {
  if (!plan.inputs) return load_slots<Strict>(f, plan, clip, b, mean);
  load_inputs<Strict>(f, plan, clip, b, V, mean);
  if (f.stencil.interleaved)
    for (int t = 0; t < plan.slots; ++t) slot_mean(plan, V + t * L, f.shape.channels, plan.slots * L, mean + t * L);
}

// The stencil's products of one slot: 36 points or 16 positions. Slots have neighbours, but the first and the last.
template <bool Strict, bool Before, bool After>
SOAP_INLINE void slot_products(const float* weight, const Plan& plan, const float* mean, int slot, float* m) {
  const auto add = [&](v z, int point, const float* w) {
    const float* a = mean + point * plan.mean_step + slot * L;
    if (Before) z = fma(ld(a - L), set1(w[0]), z);
    z = fma(ld(a), set1(w[1]), z);
    if (After) z = fma(ld(a + L), set1(w[2]), z);
    return z;
  };
  for (int k = 0; k < plan.points; ++k) {
    v z = set1(0.f);
    if (Strict) {
      for (int tap = 0; tap < 9; ++tap) z = add(z, (k / 4 + tap / 3) * WINDOW + k % 4 + tap % 3, weight + tap * 3);
    } else {
      z = add(z, k, weight + k * 3);
    }
    st(m + k * L, z);
  }
}

template <bool Strict>
SOAP_INLINE void stencil_products(const float* weight, const Plan& plan, const float* mean, int slot, float* m) {
  const bool before = slot > 0, after = slot + 1 < plan.slots;
  if (before && after) return slot_products<Strict, true, true>(weight, plan, mean, slot, m);
  if (before) return slot_products<Strict, true, false>(weight, plan, mean, slot, m);
  if (after) return slot_products<Strict, false, true>(weight, plan, mean, slot, m);
  slot_products<Strict, false, false>(weight, plan, mean, slot, m);
}

// s(stencil) of each slot of a block: 16 positions, computed once and used by all channels.
template <bool Strict>
static __attribute__((noinline)) void priors(
    const Fuse& f, const Plan& plan, const float* mean, float* products_of_slot, float* prior) {
  for (int t = 0; t < plan.slots; ++t) {
    v z[TILE][TILE];
    stencil_products<Strict>(f.stencil.weight, plan, mean, t, products_of_slot);
    points_to_positions<Strict>(products_of_slot, z);
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) st(prior + (t * POSITIONS + k) * L, sigmoid2(z[k / 4][k % 4]));
  }
}

// Pixels to be asked for while a pair of blocks' products run: the next pair's windows, this pair's gradient.
struct Ahead {
  const char* base[2][4];  // by block of a pair and segment: first row of plane 0; null: nothing to ask for
  int64_t row;             // bytes
  const int64_t* plane;    // elements of 4 bytes
  int rows;
};

// Blocks next and next + 1, if before last: `rows` rows from row `above` of each segment on.
SOAP_INLINE Ahead look_ahead(const Source& x, int64_t clip, const Blocks& grid, int64_t next, int64_t last, int height,
    int width, int above, int rows) {
  Ahead a = {};
  if (x.dtype != Dtype::f32 || x.col != 1) return a;
  a.row = x.row * 4;
  a.plane = x.plane;
  a.rows = rows;
  for (int h = 0; h < 2 && next + h < last; ++h) {
    Block b;
    locate(grid, next + h, height, width, b);
    for (int s = 0; s < 4; ++s) {
      const Segment& g = b.segment[s];
      if (g.rows == TILE && g.row + above >= 0 && g.row + above + rows <= height)
        a.base[h][s] = reinterpret_cast<const char*>(
            static_cast<const float*>(x.data) + clip * x.clip + (g.row + above) * x.row + g.col);
    }
  }
  return a;
}

// The step-th segment row (of 4 * rows) of block h, plane 0; null: nothing to ask for.
SOAP_INLINE const char* to_ask(const Ahead& a, int h, int step) {
  if (step >= 4 * a.rows || !a.base[h][step % 4]) return nullptr;
  return a.base[h][step % 4] + step / 4 * a.row;
}

// OUTPUTS outputs x `Pair` blocks: sum over inputs [first, last) of V[i] * weight[i].
// While it runs, one line of each plane is asked for at up to two places: spread out like this, so that the few buffers
// for outstanding misses never fill and the arithmetic goes on.
template <int Pair, int Asks>
SOAP_INLINE void product(const float* V0, const float* V1, const float* weight, int first, int last, v (&a)[OUTPUTS],
    v (&b)[OUTPUTS], const char* ask0, const char* ask1, const int64_t* planes0, const int64_t* planes1) {
  SOAP_UNROLL(1)
  for (int i = first; i < last; ++i) {
    if (Asks >= 1) prefetch(ask0 + planes0[i] * 4);
    if (Asks >= 2) prefetch(ask1 + planes1[i] * 4);
    const v x = ld(V0 + i * L);
    const v y = Pair == 2 ? ld(V1 + i * L) : x;
    const float* w = weight + i * OUTPUTS;
    SOAP_UNROLL(12)
    for (int o = 0; o < OUTPUTS; ++o) {
      v u = set1(w[o]);
#if SOAP_ISA >= 1
      // Keeps the broadcast in a register, shared by both blocks, rather than folded twice into a memory operand.
      if (Pair == 2) __asm__("" : "+v"(u));
#endif
      a[o] = fma(x, u, a[o]);
      if (Pair == 2) b[o] = fma(y, u, b[o]);
    }
  }
}

// Products of outputs [group * plan.group, ...) for one or two blocks. M[o][point].
template <bool Strict, int Pair>
static __attribute__((noinline)) void products(const Conv& conv, const Plan& plan, int group, const float* V0,
    const float* V1, float* M0, float* M1, const Ahead& ahead, const Ahead& beside) {
  const int I = plan.inputs, first = group * plan.group;
  const int count =
      round_up(plan.outputs, OUTPUTS) - first < plan.group ? round_up(plan.outputs, OUTPUTS) - first : plan.group;
  constexpr int KINDS = Strict ? 9 : POINTS;  // weights per pair of planes
  const float* weight = conv.weight + static_cast<int64_t>(first) * I * KINDS;
  for (int k = 0; k < plan.points; ++k) {
    for (int o = 0; o < count; o += OUTPUTS) {
      v a[OUTPUTS], b[OUTPUTS];
      // F(4x4)'s point (1, 1) reaches all 16 positions with factor 1: there the bias comes in.
      const bool biased = conv.bias && (Strict || k == 7);
      SOAP_UNROLL(12)
      for (int j = 0; j < OUTPUTS; ++j) a[j] = b[j] = set1(0.f);
      for (int j = 0; biased && j < OUTPUTS; ++j)
        a[j] = b[j] = set1(first + o + j < plan.outputs ? conv.bias[first + o + j] : 0.f);
      const float* w = weight + static_cast<int64_t>(o) * I * KINDS;
      if (Strict) {
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t at = ((k / 4 + tap / 3) * WINDOW + k % 4 + tap % 3) * plan.v_step;
          product<Pair, 0>(V0 + at, V1 + at, w + static_cast<int64_t>(tap) * I * OUTPUTS,
              tap == 4 ? 0 : conv.centre_inputs, I, a, b, nullptr, nullptr, nullptr, nullptr);
        }
      } else {
        const float *x = V0 + k * plan.v_step, *y = V1 + k * plan.v_step,
                    *u = w + static_cast<int64_t>(k) * I * OUTPUTS;
        const int from = sees_centre(k) ? 0 : conv.centre_inputs;
        // The first two groups of outputs ask for one block each.
        const int h = o / OUTPUTS;
        const char* next = h < 2 ? to_ask(ahead, h, k) : nullptr;
        const char* grad = h < 2 ? to_ask(beside, h, k) : nullptr;
        if (next && grad) product<Pair, 2>(x, y, u, from, I, a, b, next, grad, ahead.plane, beside.plane);
        else if (next) product<Pair, 1>(x, y, u, from, I, a, b, next, nullptr, ahead.plane, nullptr);
        else if (grad) product<Pair, 1>(x, y, u, from, I, a, b, grad, nullptr, beside.plane, nullptr);
        else product<Pair, 0>(x, y, u, from, I, a, b, nullptr, nullptr, nullptr, nullptr);
      }
      SOAP_UNROLL(12)
      for (int j = 0; j < OUTPUTS; ++j) {
        st(M0 + (o + j) * plan.m_step + k * L, a[j]);
        if (Pair == 2) st(M1 + (o + j) * plan.m_step + k * L, b[j]);
      }
    }
  }
}

// The stages, gathered into the table `stages` in prepare.cpp.
size_t fuse_scratch(const Fuse& f);
void fuse(const Fuse& f, int64_t clip, int64_t first, int64_t last, float* scratch);
int gradient_inputs(int inputs);
int gradient_outputs(int outputs);
int gradient_group(int outputs);
size_t sweep_scratch(const Sweep& w);
void sweep_open(const Sweep& w, float* scratch);
void sweep_begin(const Sweep& w, float* scratch);
void sweep(const Sweep& w, int64_t clip, int64_t first, int64_t last, float* scratch, double* gate);
void sweep_end(const Sweep& w, float* scratch, const ChunkGradients& out);

}  // namespace soap::cpu::SOAP_ISA_NS
