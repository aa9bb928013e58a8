#include "fold.h"

#include <algorithm>
#include <cmath>

namespace soap::cpu {
namespace {

// HMEM's tensors for tuple size k: motion weight and bias first for all sizes, then project's.
struct Tuple {
  int o, maps, first_map;
  const double *motion, *motion_bias, *project, *project_bias;
};

std::vector<Tuple> tuples_of(const Weights& w) {
  std::vector<Tuple> all;
  const size_t sizes = w.tuple_sizes.size(), at = w.hmem_at();
  int first_map = 0;
  for (size_t k = 0; k < sizes; ++k) {
    const int o = w.tuple_sizes[k];
    all.push_back({o, w.frames - o, first_map, w.tensor[at + 2 * k].data(), w.tensor[at + 2 * k + 1].data(),
        w.tensor[at + 2 * sizes + 2 * k].data(), w.tensor[at + 2 * sizes + 2 * k + 1].data()});
    first_map += w.frames - o;
  }
  return all;
}

int maps_of(const Weights& w) {
  int maps = 0;
  for (const int o : w.tuple_sizes) maps += w.frames - o;
  return maps;
}

// Channel c of one tuple's projected difference, as a 3x3 conv over the o + 1 frames it spans: [f][c'][9]. Frames
// 0 .. o - 1 enter as they are (the centre tap), frames 1 .. o through the conv with a minus.
Numbers difference(const Tuple& m, int C, int c) {
  const int P = m.o * C;
  Numbers d(static_cast<size_t>(m.o + 1) * C * 9, 0.);
  for (int j = 0; j < P; ++j) {
    const double p = m.project[c * P + j];
    const double* from = m.motion + static_cast<size_t>(j) * P * 9;
    double* to = d.data() + C * 9;
    for (int k = 0; k < P * 9; ++k) to[k] -= p * from[k];
  }
  for (int j = 0; j < P; ++j) d[j * 9 + 4] += m.project[c * P + j];
  return d;
}

double constant(const Tuple& m, int C, int c) {
  double s = m.project_bias[c];
  for (int j = 0; j < m.o * C; ++j) s -= m.project[c * m.o * C + j] * m.motion_bias[j];
  return s;
}

void fold_hmem(const Weights& w, Folded& f, const Each& each) {
  const int T = w.frames, C = w.channels, P = T * C, M = maps_of(w);
  const double *restore = w.tensor[w.tensor.size() - 2].data(), *restore_bias = w.tensor.back().data();
  const std::vector<Tuple> tuples = tuples_of(w);
  f.conv.resize(static_cast<size_t>(P) * P * 9);
  f.conv_bias.resize(P);
  each(C, [&](int c) {
    std::vector<Numbers> differences;
    for (const Tuple& m : tuples) differences.push_back(difference(m, C, c));
    Numbers row(static_cast<size_t>(P) * 9);
    for (int t = 0; t < T; ++t) {
      std::fill(row.begin(), row.end(), 0.);
      double bias = restore_bias[t];
      for (size_t k = 0; k < tuples.size(); ++k) {
        const Tuple& m = tuples[k];
        const double* r = restore + t * M + m.first_map;
        const double k0 = constant(m, C, c);
        const Numbers& from = differences[k];
        for (int i = 0; i < m.maps; ++i) {  // the map of the tuple at frame i reads frames i .. i + o
          double* to = row.data() + static_cast<size_t>(i) * C * 9;
          for (size_t q = 0; q < from.size(); ++q) to[q] += r[i] * from[q];
          bias += r[i] * k0;
        }
      }
      f.conv_bias[t * C + c] = bias;
      std::copy(row.begin(), row.end(), f.conv.begin() + static_cast<ptrdiff_t>(t * C + c) * P * 9);
    }
  });
}

void unfold_hmem(const Weights& w, const FoldedGradients& g, std::vector<Numbers>& out, const Each& each) {
  const int T = w.frames, C = w.channels, P = T * C, M = maps_of(w);
  const size_t sizes = w.tuple_sizes.size(), at = w.hmem_at();
  const double* restore = w.tensor[w.tensor.size() - 2].data();
  Numbers& drestore = out[out.size() - 2];
  Numbers& drestore_bias = out.back();
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) drestore_bias[t] += g.conv_bias[t * C + c];
  const std::vector<Tuple> tuples = tuples_of(w);
  for (size_t k = 0; k < sizes; ++k) {
    const Tuple& m = tuples[k];
    const int Q = m.o * C;
    Numbers &dmotion = out[at + 2 * k], &dmotion_bias = out[at + 2 * k + 1];
    Numbers &dproject = out[at + 2 * sizes + 2 * k], &dproject_bias = out[at + 2 * sizes + 2 * k + 1];
    // The gradient of channel c's difference, and c's share of that of restore.
    std::vector<Numbers> dd(C);
    Numbers by_channel(static_cast<size_t>(C) * T * m.maps);
    each(C, [&](int c) {
      const Numbers d = difference(m, C, c);
      dd[c].assign(d.size(), 0.);
      const double k0 = constant(m, C, c);
      for (int t = 0; t < T; ++t) {
        const double* row = g.conv.data() + static_cast<size_t>(t * C + c) * P * 9;
        const double db = g.conv_bias[t * C + c];
        for (int i = 0; i < m.maps; ++i) {
          const double r = restore[t * M + m.first_map + i];
          const double* x = row + static_cast<size_t>(i) * C * 9;
          double s[4] = {db * k0, 0, 0, 0};  // several chains, so that the additions overlap
          size_t q = 0;
          for (; q + 4 <= d.size(); q += 4)
            for (int u = 0; u < 4; ++u) {
              s[u] += x[q + u] * d[q + u];
              dd[c][q + u] += r * x[q + u];
            }
          for (; q < d.size(); ++q) {
            s[0] += x[q] * d[q];
            dd[c][q] += r * x[q];
          }
          by_channel[(static_cast<size_t>(c) * T + t) * m.maps + i] = (s[0] + s[1]) + (s[2] + s[3]);
          dproject_bias[c] += r * db;
        }
      }
    });
    for (int c = 0; c < C; ++c)
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < m.maps; ++i)
          drestore[t * M + m.first_map + i] += by_channel[(static_cast<size_t>(c) * T + t) * m.maps + i];
    each(Q, [&](int j) {
      const double* motion = m.motion + static_cast<size_t>(j) * Q * 9;
      double* to = dmotion.data() + static_cast<size_t>(j) * Q * 9;
      for (int c = 0; c < C; ++c) {
        const double dk = dproject_bias[c], p = m.project[c * Q + j];
        const double* moved = dd[c].data() + C * 9;
        double s[3] = {dd[c][j * 9 + 4] - dk * m.motion_bias[j], 0, 0};
        for (int q = 0; q < Q * 9; q += 3)
          for (int u = 0; u < 3; ++u) {
            s[u] -= moved[q + u] * motion[q + u];
            to[q + u] -= p * moved[q + u];
          }
        dproject[c * Q + j] = (s[0] + s[1]) + s[2];
        dmotion_bias[j] -= p * dk;
      }
    });
  }
}

void fold_cwem(const Weights& w, Folded& f) {
  const int C = w.channels, R = w.hidden;
  const Numbers &expand = w.tensor[w.cwem_at()], &temporal = w.tensor[w.cwem_at() + 1],
                &bias = w.tensor[w.cwem_at() + 2], &squeeze = w.tensor[w.cwem_at() + 3];
  f.taps.assign(static_cast<size_t>(3) * C * C, 0.);
  f.bias.assign(C, 0.);
  for (int a = 0; a < R; ++a)
    for (int k = 0; k < 3; ++k)
      for (int q = 0; q < C; ++q) {
        double s = 0;
        for (int b = 0; b < R; ++b) s += temporal[(a * R + b) * 3 + k] * expand[b * C + q];
        for (int p = 0; p < C; ++p) f.taps[(k * C + p) * C + q] += squeeze[p * R + a] * s;
      }
  for (int p = 0; p < C; ++p)
    for (int a = 0; a < R; ++a) f.bias[p] += squeeze[p * R + a] * bias[a];
}

void unfold_cwem(const Weights& w, const FoldedGradients& g, std::vector<Numbers>& out) {
  const int C = w.channels, R = w.hidden;
  const size_t at = w.cwem_at();
  const Numbers &expand = w.tensor[at], &temporal = w.tensor[at + 1], &bias = w.tensor[at + 2],
                &squeeze = w.tensor[at + 3];
  for (int a = 0; a < R; ++a) {
    for (int p = 0; p < C; ++p) {
      out[at + 2][a] += squeeze[p * R + a] * g.bias[p];
      out[at + 3][p * R + a] += g.bias[p] * bias[a];
    }
    for (int k = 0; k < 3; ++k)
      for (int q = 0; q < C; ++q) {
        double moved = 0, dmoved = 0;
        for (int b = 0; b < R; ++b) moved += temporal[(a * R + b) * 3 + k] * expand[b * C + q];
        for (int p = 0; p < C; ++p) {
          dmoved += squeeze[p * R + a] * g.taps[(k * C + p) * C + q];
          out[at + 3][p * R + a] += g.taps[(k * C + p) * C + q] * moved;
        }
        for (int b = 0; b < R; ++b) {
          out[at + 1][(a * R + b) * 3 + k] += dmoved * expand[b * C + q];
          out[at][b * C + q] += dmoved * temporal[(a * R + b) * 3 + k];
        }
      }
  }
}

}  // namespace

Folded fold(const Weights& w, const Each& each) {
  Folded f;
  if (w.three_dem) f.stencil = w.tensor[0];
  if (w.cwem) fold_cwem(w, f);
  if (w.hmem()) fold_hmem(w, f, each);
  return f;
}

std::vector<Numbers> unfold(const Weights& w, const FoldedGradients& d, const Each& each) {
  std::vector<Numbers> out;
  for (const Numbers& t : w.tensor) out.emplace_back(t.size(), 0.);
  if (w.three_dem) out[0] = d.stencil;
  if (w.cwem) unfold_cwem(w, d, out);
  if (w.hmem()) unfold_hmem(w, d, out, each);
  return out;
}

void gate_forward(const Folded& f, int T, int C, const double* means, double* gate) {
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < C; ++p) {
      double z = f.bias[p];
      for (int k = 0; k < 3; ++k) {
        const int s = t + k - 1;
        if (s < 0 || s >= T) continue;
        for (int q = 0; q < C; ++q) z += f.taps[(k * C + p) * C + q] * means[s * C + q];
      }
      gate[t * C + p] = 1 / (1 + std::exp(-z));
    }
}

void gate_backward(const Folded& f, int T, int C, const double* means, const double* gate, const double* dgate,
    FoldedGradients& d, double* dmeans) {
  for (int i = 0; i < T * C; ++i) dmeans[i] = 0;
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < C; ++p) {
      const double s = gate[t * C + p], dz = dgate[t * C + p] * s * (1 - s);
      d.bias[p] += dz;
      for (int k = 0; k < 3; ++k) {
        const int u = t + k - 1;
        if (u < 0 || u >= T) continue;
        for (int q = 0; q < C; ++q) {
          d.taps[(k * C + p) * C + q] += dz * means[u * C + q];
          dmeans[u * C + q] += dz * f.taps[(k * C + p) * C + q];
        }
      }
    }
}

}  // namespace soap::cpu
