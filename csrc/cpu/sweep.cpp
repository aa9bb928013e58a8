// Stage `sweep`: one pass over x and the incoming gradient. The pre-activations are computed again (that is cheaper
// than the memory traffic of having saved them), dz = g s (1 - s), and the gradient of the weights is a product of the
// transformed inputs with the transformed dz, summed over tiles: dU = V Z^T by point, and dW = G^T dU G once per chunk.
#include "block.h"

namespace soap::cpu::SOAP_ISA_NS {
namespace {

// Scratch of a thread beyond the plan's: the accumulators of one chunk first, then what a group of blocks needs.
struct Buffers {
  float* dU;       // [group of outputs][point or tap][padded input][padded output][tiles side by side]
  float* bias;     // [output] x L
  float* stencil;  // [point or tap][3] x L
  float* gate;     // [plane] x L, of one clip
  float *V, *M, *mean, *slot_products;
  float *prior, *gathered, *spread_slots;  // by block and slot: s1, the gradient's sum over channels, its points
  float* D;                                // dz of one block by position and output, tiles in lanes
  float* turned;                           // the same by position, run of `side` tiles, output and tile of the run
  float* Z;                                // by point, and so on
};

struct Sizes {
  int side;            // tiles side by side in a vector of outputs
  int outputs_padded;  // of a group
  int inputs_padded;
  int kinds;  // points, or taps if strict
  int groups;
  int64_t dU_group;
  int64_t d_step, turned_step,
      z_step;  // between positions or points; a vector more than a power of two, for the caches
};

// Two tiles side by side where that leaves fewer lanes to padding: the 24 outputs of frames are three vectors instead
// of twice two. It doubles the accumulators, which a layer of features would pay for with memory traffic.
int tiles_side_by_side(int outputs) { return round_up(outputs, L / 2) < round_up(outputs, L) ? 2 : 1; }
int pad_outputs(int outputs) { return round_up(outputs, L / tiles_side_by_side(outputs)); }

Sizes sizes_of(const Plan& p) {
  Sizes s;
  s.side = tiles_side_by_side(p.group);
  s.outputs_padded = pad_outputs(p.group);
  s.inputs_padded = round_up(p.inputs, INPUTS);
  s.kinds = p.strict ? 9 : POINTS;
  s.groups = p.group ? (p.outputs + p.group - 1) / p.group : 0;
  s.d_step = static_cast<int64_t>(s.outputs_padded + 1) * L;
  s.turned_step = static_cast<int64_t>(s.outputs_padded) * L + L;
  s.z_step = static_cast<int64_t>(p.blocks) * L * s.outputs_padded + L;
  s.dU_group = static_cast<int64_t>(s.kinds) * s.inputs_padded * s.outputs_padded * s.side;
  return s;
}

// The chunk's accumulators come first, `begins` floats of them.
int64_t lay(const Plan& p, const Sizes& s, int planes, float* base, Buffers* out, int64_t* begins = nullptr) {
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* at = base + used;
    used += (n + 15) / 16 * 16;
    return at;
  };
  const int64_t slots = static_cast<int64_t>(p.blocks) * p.slots;
  Buffers b;
  b.dU = take(s.groups * s.dU_group);
  b.bias = take(static_cast<int64_t>(p.outputs) * L);
  b.stencil = take(static_cast<int64_t>(s.kinds) * 3 * L);
  if (begins) *begins = used;
  b.gate = take(static_cast<int64_t>(planes) * L);
  b.V = take(p.blocks * p.v_block);
  b.M = take(p.blocks * p.m_block);
  b.mean = take(p.blocks * p.mean_block);
  b.slot_products = take(p.m_step);
  b.prior = take(slots * POSITIONS * L);
  b.gathered = take(slots * POSITIONS * L);
  b.spread_slots = take(static_cast<int64_t>(p.slots) * POINTS * L);
  b.D = take(POSITIONS * s.d_step);
  b.turned = take(POSITIONS * s.turned_step);
  b.Z = take(p.points * s.z_step);
  if (out) *out = b;
  return used;
}

// The incoming gradient of one plane of a block: 4 rows of each segment, then tiles in lanes.
SOAP_INLINE void gradient_tiles(
    const Source& g, bool in_place, int64_t clip, int plane, const Block& b, v (&e)[TILE][TILE]) {
  alignas(64) float buffer[4][TILE * STAGE];
  SOAP_UNROLL(4)
  for (int s = 0; s < 4; ++s) {
    const Rows rows = own_rows(g, in_place, clip, plane, b, s, buffer[s]);
    SOAP_UNROLL(4)
    for (int k = 0; k < TILE; ++k) e[k][s] = ld(rows.first + k * rows.apart);
  }
}

SOAP_INLINE void write_tiles(const Sink& to, int64_t clip, int plane, const Block& b, const v (&d)[TILE][TILE]) {
  alignas(64) float rows[4][TILE * L];
  SOAP_UNROLL(4)
  for (int k = 0; k < TILE; ++k) {
    v a = d[k][0], c = d[k][1], e = d[k][2], f = d[k][3];
    transpose4(a, c, e, f);
    st(rows[0] + k * L, a);
    st(rows[1] + k * L, c);
    st(rows[2] + k * L, e);
    st(rows[3] + k * L, f);
  }
  for (int s = 0; s < 4; ++s) write(to, clip, plane, b.segment[s], rows[s]);
}

// dz of the outputs of one group for one block. Also what the other priors need of the gradient: its sum over pixels
// (gate) and over channels (stencil).
template <bool Strict>
__attribute__((noinline)) void differentiate(const Sweep& w, const Plan& plan, const Sizes& sizes, int group,
    int64_t clip, const Block& b, const float* M, const float* prior, float* gathered, float* D, float* bias,
    float* gate) {
  const Fuse& f = w.forward;
  const int C = f.shape.channels, planes = f.shape.planes();
  const int first = group * plan.group;
  const int last = plan.outputs ? (first + plan.group < planes ? first + plan.group : planes) : planes;
  const bool multiply = f.mode == Mode::multiplicative;
  const bool grad_in_place = loads_in_place(w.grad), x_in_place = loads_in_place(f.base);
  const v one = set1(1.f);
  for (int plane = first; plane < last; ++plane) {
    v e[TILE][TILE], z[TILE][TILE] = {};
    if (grad_in_place && plane + 1 < last) fetch_near<TILE>(w.grad, clip, plane + 1, b, 0);
    gradient_tiles(w.grad, grad_in_place, clip, plane, b, e);
    v dbase[TILE][TILE] = {};
    if (multiply) {
      v x[TILE][TILE];
      gradient_tiles(f.base, x_in_place, clip, plane, b, x);
      SOAP_UNROLL(16)
      for (int k = 0; k < POSITIONS; ++k) {
        dbase[k / 4][k % 4] = e[k / 4][k % 4];
        e[k / 4][k % 4] = e[k / 4][k % 4] * x[k / 4][k % 4];
      }
    }
    v total = set1(0.f);
    SOAP_UNROLL(4)
    for (int k = 0; k < TILE; ++k) total = total + ((e[k][0] + e[k][1]) + (e[k][2] + e[k][3]));
    st(gate + plane * L, ld(gate + plane * L) + total);
    SOAP_UNROLL(4)
    for (int k = 0; k < TILE; ++k) transpose4(e[k][0], e[k][1], e[k][2], e[k][3]);
    if (multiply && w.dbase.data) {
      SOAP_UNROLL(4)
      for (int k = 0; k < TILE; ++k) transpose4(dbase[k][0], dbase[k][1], dbase[k][2], dbase[k][3]);
    }
    if (plan.slots) {
      float* to = gathered + (plane / C) * POSITIONS * L;
      SOAP_UNROLL(16)
      for (int k = 0; k < POSITIONS; ++k)
        st(to + k * L, plane % C ? ld(to + k * L) + e[k / 4][k % 4] : e[k / 4][k % 4]);
    }
    if (plan.outputs) {
      points_to_positions<Strict>(M + (plane - first) * plan.m_step, z);
      v db = set1(0.f);
      SOAP_UNROLL(16)
      for (int k = 0; k < POSITIONS; ++k) {
        const v s = sigmoid2_of_finite(z[k / 4][k % 4]);
        const v d = e[k / 4][k % 4] * (s * (one - s));
        db = db + d;
        st(D + k * sizes.d_step + (plane - first) * L, d);
        z[k / 4][k % 4] = s;
        e[k / 4][k % 4] = d;
      }
      st(bias + plane * L, ld(bias + plane * L) + db);
      if (w.dz.data) write_tiles(w.dz, clip, plane, b, e);
    }
    if (multiply && w.dbase.data) {  // g (offset + gate + s1 + s3)
      const v rest = set1(f.offset + (f.gate ? f.gate[clip * planes + plane] : 0.f));
      SOAP_UNROLL(16)
      for (int k = 0; k < POSITIONS; ++k) {
        v s = plan.outputs ? z[k / 4][k % 4] + rest : rest;
        if (plan.slots) s = s + ld(prior + ((plane / C) * POSITIONS + k) * L);
        dbase[k / 4][k % 4] = dbase[k / 4][k % 4] * s;
      }
      write_tiles(w.dbase, clip, plane, b, dbase);
    }
  }
}

// dz of the stencil's slots, and the products with the means around them.
template <bool Strict>
__attribute__((noinline)) void differentiate_stencil(const Sweep& w, const Plan& plan, int64_t clip, const Block& b,
    const float* mean, const float* prior, const float* gathered, float* spread_slots, float* acc) {
  const v one = set1(1.f);
  for (int t = 0; t < plan.slots; ++t) {
    v d[TILE][TILE];
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) {
      const v s = ld(prior + (t * POSITIONS + k) * L);
      d[k / 4][k % 4] = ld(gathered + (t * POSITIONS + k) * L) * (s * (one - s));
    }
    if (w.dz.data) write_tiles(w.dz, clip, plan.outputs + t, b, d);
    positions_to_points<Strict>(d, spread_slots + t * L, plan.mean_step);
  }
  const int kinds = Strict ? 9 : POINTS;
  for (int k = 0; k < kinds; ++k) {
    v a[3] = {ld(acc + (k * 3) * L), ld(acc + (k * 3 + 1) * L), ld(acc + (k * 3 + 2) * L)};
    for (int q = 0; q < (Strict ? POSITIONS : 1); ++q) {
      const int from = Strict ? q : k;
      const int point = Strict ? (q / 4 + k / 3) * WINDOW + q % 4 + k % 3 : k;
      const float *z = spread_slots + from * plan.mean_step, *m = mean + point * plan.mean_step;
      v z_last = set1(0.f), m_last = set1(0.f);
      for (int t = 0; t < plan.slots; ++t) {
        const v z_here = ld(z + t * L), m_here = ld(m + t * L);
        a[0] = fma(z_here, m_last, a[0]);
        a[1] = fma(z_here, m_here, a[1]);
        a[2] = fma(z_last, m_here, a[2]);
        z_last = z_here;
        m_last = m_here;
      }
    }
    for (int d = 0; d < 3; ++d) st(acc + (k * 3 + d) * L, a[d]);
  }
}

// D (tiles in lanes) to Z (by point and tile, outputs in lanes).
template <bool Strict>
__attribute__((noinline)) void turn(const Sizes& sizes, const float* D, float* turned, float* Z) {
  const int P = sizes.outputs_padded;
  for (int k = 0; k < POSITIONS; ++k) {
    float* to = Strict ? Z + k * sizes.z_step : turned + k * sizes.turned_step;
    if (sizes.side == 2)
      for (int o = 0; o < P; o += L / 2) transpose_pairs(D + k * sizes.d_step + o * L, L, to + 2 * o, 2 * P);
    else
      for (int o = 0; o < P; o += L) transpose(D + k * sizes.d_step + o * L, L, to + o, P);
  }
  if (Strict) return;
  for (int64_t j = 0; j < static_cast<int64_t>(L) * P; j += L) {
    v d[TILE][TILE];
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) d[k / 4][k % 4] = ld(turned + k * sizes.turned_step + j);
    positions_to_points<false>(d, Z + j, sizes.z_step);
  }
}

// Inputs [From, INPUTS) x N vectors of outputs: sum over tiles of V[input][tile] Z[tile][output]; with two tiles side
// by side even and odd ones apart. strict: 16 windows of V meet positions of Z.
template <int N, int From, int Side, bool Strict>
SOAP_INLINE void accumulate(const Plan& plan, const Sizes& sizes, const float* V, const float* Z, int kind, int input,
    int vector, int blocks, float* dU) {
  const int row = Side * sizes.outputs_padded;
  dU += vector * L;
  v a[INPUTS][N];
  SOAP_UNROLL(8)
  for (int i = From; i < INPUTS; ++i) {
    SOAP_UNROLL(3)
    for (int n = 0; n < N; ++n) a[i][n] = ld(dU + i * row + n * L);
  }
  for (int q = 0; q < (Strict ? POSITIONS : 1); ++q) {
    const int point = Strict ? (q / 4 + kind / 3) * WINDOW + q % 4 + kind % 3 : kind;
    const float* z = Z + (Strict ? q : kind) * sizes.z_step + vector * L;
    for (int h = 0; h < blocks; ++h) {
      const float* x = V + h * plan.v_block + point * plan.v_step + input * L;
      SOAP_UNROLL(1)
      for (int j = 0; j < L; j += Side, z += row, x += Side) {
        v b[N];
        SOAP_UNROLL(3)
        for (int n = 0; n < N; ++n) b[n] = ld(z + n * L);
        SOAP_UNROLL(8)
        for (int i = From; i < INPUTS; ++i) {
          const v u = Side == 2 ? set_pair(x + i * L) : set1(x[i * L]);
          SOAP_UNROLL(3)
          for (int n = 0; n < N; ++n) a[i][n] = fma(u, b[n], a[i][n]);
        }
      }
    }
  }
  SOAP_UNROLL(8)
  for (int i = From; i < INPUTS; ++i) {
    SOAP_UNROLL(3)
    for (int n = 0; n < N; ++n) st(dU + i * row + n * L, a[i][n]);
  }
}

template <int From, int Side, bool Strict>
SOAP_INLINE void accumulate_row(
    const Plan& plan, const Sizes& sizes, const float* V, const float* Z, int kind, int input, int blocks, float* dU) {
  const int vectors = sizes.outputs_padded * Side / L;
  int k = 0;
  for (; k + VECTORS <= vectors; k += VECTORS)
    accumulate<VECTORS, From, Side, Strict>(plan, sizes, V, Z, kind, input, k, blocks, dU);
  if (vectors - k == 2) accumulate<2, From, Side, Strict>(plan, sizes, V, Z, kind, input, k, blocks, dU);
  if (vectors - k == 1) accumulate<1, From, Side, Strict>(plan, sizes, V, Z, kind, input, k, blocks, dU);
}

// `centre`: so many of the first inputs have a gradient at their centre tap alone, which only points that see it need.
template <int Side, bool Strict>
__attribute__((noinline)) void weight_products(
    const Plan& plan, const Sizes& sizes, const float* V, const float* Z, int centre, int blocks, float* dU) {
  constexpr int FRAME = 3;  // inputs of a first frame left out of a tile that has others
  for (int kind = 0; kind < sizes.kinds; ++kind) {
    const int from = (Strict ? kind == 4 : sees_centre(kind)) ? 0 : centre;
    for (int i = from / INPUTS * INPUTS; i < sizes.inputs_padded; i += INPUTS) {
      float* at = dU + (static_cast<int64_t>(kind) * sizes.inputs_padded + i) * sizes.outputs_padded * Side;
      if (from - i >= FRAME) accumulate_row<FRAME, Side, Strict>(plan, sizes, V, Z, kind, i, blocks, at);
      else accumulate_row<0, Side, Strict>(plan, sizes, V, Z, kind, i, blocks, at);
    }
  }
}

template <bool Strict>
void sweep_blocks(const Sweep& w, int64_t clip, int64_t first, int64_t last, float* scratch, double* gate) {
  const Fuse& f = w.forward;
  const Plan plan = plan_of(f);
  const Sizes sizes = sizes_of(plan);
  Buffers buf;
  lay(plan, sizes, f.shape.planes(), scratch, &buf);
  const int H = f.shape.height, W = f.shape.width;
  const Blocks grid = block_grid(H, W);
  const int groups = plan.outputs ? sizes.groups : 1;
  const int64_t slots_block = static_cast<int64_t>(plan.slots) * POSITIONS * L;
  const int planes = f.shape.planes();
  for (int p = 0; p < planes; ++p) st(buf.gate + p * L, set1(0.f));
  Block block[8];
  for (int64_t q = first; q < last; q += plan.blocks) {
    const int n = static_cast<int>(last - q < plan.blocks ? last - q : plan.blocks);
    for (int k = 0; k < n; ++k) {
      locate(grid, q + k, H, W, block[k]);
      float* mean = buf.mean + k * plan.mean_block;
      load_block<Strict>(f, plan, clip, block[k], buf.V + k * plan.v_block, mean);
      if (plan.slots) priors<Strict>(f, plan, mean, buf.slot_products, buf.prior + k * slots_block);
    }
    const Ahead ahead = plan.outputs ? look_ahead(f.x, clip, grid, q + n, last, H, W, -1, WINDOW) : Ahead{};
    for (int g = 0; g < groups; ++g) {
      if (plan.outputs) {
        for (int k = 0; k < n; k += 2) {
          const float* V = buf.V + k * plan.v_block;
          float* M = buf.M + k * plan.m_block;
          const Ahead beside = g ? Ahead{} : look_ahead(w.grad, clip, grid, q + k, last, H, W, 0, TILE);
          if (k + 1 < n)
            products<Strict, 2>(
                f.conv, plan, g, V, V + plan.v_block, M, M + plan.m_block, k + g ? Ahead{} : ahead, beside);
          else products<Strict, 1>(f.conv, plan, g, V, V, M, M, k + g ? Ahead{} : ahead, beside);
        }
      }
      for (int k = 0; k < n; ++k) {
        differentiate<Strict>(w, plan, sizes, g, clip, block[k], buf.M + k * plan.m_block, buf.prior + k * slots_block,
            buf.gathered + k * slots_block, buf.D, buf.bias, buf.gate);
        if (plan.outputs)
          turn<Strict>(sizes, buf.D, buf.turned, buf.Z + static_cast<int64_t>(k) * L * sizes.outputs_padded);
      }
      if (!plan.outputs) continue;
      const auto weigh = sizes.side == 2 ? weight_products<2, Strict> : weight_products<1, Strict>;
      weigh(plan, sizes, buf.V, buf.Z, f.conv.centre_inputs, n, buf.dU + g * sizes.dU_group);
    }
    if (plan.slots)
      for (int k = 0; k < n; ++k)
        differentiate_stencil<Strict>(w, plan, clip, block[k], buf.mean + k * plan.mean_block,
            buf.prior + k * slots_block, buf.gathered + k * slots_block, buf.spread_slots, buf.stencil);
  }
  for (int p = 0; p < planes; ++p) gate[p] += sum(ld(buf.gate + p * L));
}

}  // namespace

int gradient_inputs(int inputs) { return round_up(inputs, INPUTS); }

int gradient_outputs(int outputs) {  // whole groups, each padded
  if (!outputs) return 0;
  const int group = group_outputs(outputs);
  return (outputs + group - 1) / group * pad_outputs(group);
}

int gradient_group(int outputs) { return group_outputs(outputs); }

size_t sweep_scratch(const Sweep& w) {
  const Plan plan = plan_of(w.forward);
  return static_cast<size_t>(lay(plan, sizes_of(plan), w.forward.shape.planes(), nullptr, nullptr));
}

void sweep_open(const Sweep& w, float* scratch) {
  // All of it: padded inputs and outputs enter the products and must stay finite.
  memset(scratch, 0, sweep_scratch(w) * sizeof(float));
}

void sweep_begin(const Sweep& w, float* scratch) {
  const Plan plan = plan_of(w.forward);
  int64_t accumulators = 0;
  lay(plan, sizes_of(plan), w.forward.shape.planes(), nullptr, nullptr, &accumulators);
  memset(scratch, 0, static_cast<size_t>(accumulators) * sizeof(float));
}

void sweep(const Sweep& w, int64_t clip, int64_t first, int64_t last, float* scratch, double* gate) {
  w.forward.conv.strict ? sweep_blocks<true>(w, clip, first, last, scratch, gate)
                        : sweep_blocks<false>(w, clip, first, last, scratch, gate);
}

void sweep_end(const Sweep& w, float* scratch, const ChunkGradients& out) {
  const Plan plan = plan_of(w.forward);
  const Sizes sizes = sizes_of(plan);
  Buffers buf;
  lay(plan, sizes, w.forward.shape.planes(), scratch, &buf);
  const int P = sizes.outputs_padded;
  const int64_t all = static_cast<int64_t>(sizes.groups) * P, plane = sizes.inputs_padded * all;
  const int64_t from = static_cast<int64_t>(sizes.inputs_padded) * P * sizes.side;  // between points of dU
  for (int g = 0; g < sizes.groups; ++g) {
    for (int i = 0; i < sizes.inputs_padded; ++i) {
      for (int o = 0; o < P; o += L) {
        const int n = P - o < L ? L / 2 : L;
        const float* u = buf.dU + g * sizes.dU_group + (static_cast<int64_t>(i) * P + o) * sizes.side;
        float* to = out.conv + i * all + g * P + o;
        const auto total = [&](int kind) {
          const float* at = u + kind * from;
          return sizes.side == 2 ? add_pairs(ld(at), n == L ? ld(at + L) : set1(0.f)) : ld(at);
        };
        if (plan.strict) {
          for (int k = 0; k < 9; ++k) st_head(to + k * plane, total(k), n);
          continue;
        }
        v half[3][WINDOW];  // G^T dU
        for (int b = 0; b < WINDOW; ++b) {
          half[0][b] = half[1][b] = half[2][b] = set1(0.f);
          for (int a = 0; a < WINDOW; ++a) {
            const v d = total(a * WINDOW + b);
            for (int r = 0; r < 3; ++r)
              if (G[a][r] != 0) half[r][b] = fma(d, set1(static_cast<float>(G[a][r])), half[r][b]);
          }
        }
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < 3; ++c) {
            v s = set1(0.f);
            for (int b = 0; b < WINDOW; ++b)
              if (G[b][c] != 0) s = fma(half[r][b], set1(static_cast<float>(G[b][c])), s);
            st_head(to + (r * 3 + c) * plane, s, n);
          }
      }
    }
  }
  for (int o = 0; o < plan.outputs; ++o) out.bias[o] = sum(ld(buf.bias + o * L));
  if (!plan.slots) return;
  for (int d = 0; d < 3; ++d)
    for (int k = 0; k < 9; ++k) {
      double s = 0;
      if (plan.strict) {
        s = sum(ld(buf.stencil + (k * 3 + d) * L));
      } else {
        for (int a = 0; a < WINDOW; ++a)
          for (int b = 0; b < WINDOW; ++b)
            s += G[a][k / 3] * G[b][k % 3] * sum(ld(buf.stencil + ((a * WINDOW + b) * 3 + d) * L));
      }
      out.stencil[d * 9 + k] = s / w.forward.shape.channels;
    }
}

}  // namespace soap::cpu::SOAP_ISA_NS
