#include "backend.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "reduce.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace soap::cpu {
namespace {

bool runs_here(const Stages& s) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (s.lanes == 16)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (s.lanes == 8)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return s.lanes == 4;
}

std::atomic<const Stages*> chosen{nullptr};

// Numbers below 1e-38 take a microcode path a hundred times slower, and mean nothing beside a prior of about 1/2: while
// the stages run they count as zero.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// Aligned floats, not initialised.
class Scratch {
 public:
  explicit Scratch(size_t n) : data_(static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// Tasks 0 .. count - 1, handed out in turn. body(take): take() gives the next task or -1.
template <class Body> void share(Pool& pool, int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto take = [&]() {
    const int64_t k = next.fetch_add(1, std::memory_order_relaxed);
    return k < count ? k : int64_t{-1};
  };
  const auto run = [&]() {
    const FlushDenormals flush;
    body(take);
  };
  if (count <= 1 || pool.threads() <= 1) return run();
  pool.spread(static_cast<int>(std::min<int64_t>(pool.threads(), count)), run);
}

// task(k) for each k on its own.
template <class Task> void share_each(Pool& pool, int64_t count, const Task& task) {
  share(pool, count, [&](const auto& take) {
    for (int64_t k = take(); k >= 0; k = take()) task(k);
  });
}

// For the folds: frames are done before a second thread has woken up.
Each each_of(const Shape& shape, Pool& pool) {
  return [&pool, many = shape.planes() > 64](int count, const std::function<void(int)>& task) {
    if (many) return share_each(pool, count, [&](int64_t k) { task(static_cast<int>(k)); });
    for (int k = 0; k < count; ++k) task(k);
  };
}

// A convolution's weights laid out for the products. One thread for frames (tens of microseconds).
Scratch lay_out(
    const Stages& s, const std::vector<float>& conv, int inputs, int outputs, bool strict, double factor, Pool& pool) {
  const int groups = s.conv_groups(outputs);
  const size_t size = s.conv_group_size(inputs, strict);
  Scratch laid(groups * size);
  const auto lay = [&](int64_t g) {
    s.layout_conv(conv.data(), inputs, outputs, strict, factor, static_cast<int>(g), laid.get() + g * size);
  };
  if (groups > 8) share_each(pool, groups, lay);
  else
    for (int g = 0; g < groups; ++g) lay(g);
  return laid;
}

// All priors in the form the stages take, and what keeps it alive.
struct Laid {
  Scratch conv{0};
  std::vector<float> bias, stencil;
  Fuse fuse;
};

struct Priors {
  const Numbers* stencil;
  const std::vector<float>* conv;
  const Numbers* conv_bias;
  int centre_inputs;
};

void lay_out(
    const Stages& s, const Shape& shape, const Source& x, bool strict, const Priors& p, Pool& pool, Laid& out) {
  const int P = shape.planes();
  out.fuse.shape = shape;
  out.fuse.x = out.fuse.base = x;
  out.fuse.conv.strict = strict;
  if (!p.conv->empty()) {
    out.conv = lay_out(s, *p.conv, P, P, strict, -LOG2E, pool);
    out.bias.resize(P);
    for (int o = 0; o < P; ++o)
      out.bias[o] = static_cast<float>(p.conv_bias->empty() ? 0. : -LOG2E * (*p.conv_bias)[o]);
    out.fuse.conv.inputs = out.fuse.conv.outputs = P;
    out.fuse.conv.weight = out.conv.get();
    out.fuse.conv.bias = out.bias.data();
    out.fuse.conv.centre_inputs = p.centre_inputs;
  }
  if (!p.stencil->empty()) {
    out.stencil.resize(108);
    s.layout_stencil(p.stencil->data(), shape.channels, strict, -LOG2E, out.stencil.data());
    out.fuse.stencil.weight = out.stencil.data();
  }
}

Folded fold_and_lay_out(const Stages& s, const SoapCall& call, Pool& pool, Laid& out) {
  Folded folded = fold(call.weights, each_of(call.shape, pool));
  // HMEM's first frame is never the later tuple, so it has no 3x3 taps: strict leaves those zeros out, with their NaN.
  const Priors priors{&folded.stencil, &folded.conv, &folded.conv_bias, call.shape.channels};
  lay_out(s, call.shape, call.x, call.strict, priors, pool, out);
  return folded;
}

// Bands are cut between groups of blocks; between pairs where there are few (a layer of features).
int64_t band_unit(int64_t blocks) { return blocks < 64 ? 2 : 8; }

int64_t bands_of(int64_t blocks, int64_t at_least) {
  return std::max<int64_t>(1, std::min(blocks / std::max<int64_t>(6, band_unit(blocks)), at_least));
}

int64_t band_begin(int64_t blocks, int64_t k, int64_t n) {
  const int64_t unit = band_unit(blocks);
  return k == n ? blocks : (blocks + unit / 2) / unit * k / n * unit;
}

// `fuse` over all blocks of clips [first, last).
void fuse_clips(const Stages& s, const Fuse& f, int64_t first, int64_t last, Pool& pool) {
  const int64_t blocks = s.blocks(f.shape.height, f.shape.width).blocks;
  // Several tasks a thread, in case another process holds one of the cores.
  const int64_t bands = bands_of(blocks, (8 * pool.threads() + last - first - 1) / std::max<int64_t>(1, last - first));
  share(pool, (last - first) * bands, [&](const auto& take) {
    const Scratch scratch(s.fuse_scratch(f));
    for (int64_t k = take(); k >= 0; k = take())
      s.fuse(f, first + k / bands, band_begin(blocks, k % bands, bands), band_begin(blocks, k % bands + 1, bands),
          scratch.get());
  });
}

void plane_means(const Stages& s, const SoapCall& call, int64_t clip, int first, int count, double* mean) {
  s.plane_sums(call.x, clip, first, count, call.shape.height, call.shape.width, mean);
  for (int k = 0; k < count; ++k) mean[k] /= static_cast<double>(call.shape.pixels());
}

}  // namespace

std::vector<const Stages*> available_stages() {
  std::vector<const Stages*> all;
#if defined(__x86_64__)
  for (const Stages* s : {&avx512::stages, &avx2::stages})
    if (runs_here(*s)) all.push_back(s);
#endif
  all.push_back(&plain::stages);
  return all;
}

bool choose_stages(const char* name) {
  for (const Stages* s : available_stages()) {  // the best comes first
    if (std::strcmp(name, "auto") == 0 || std::strcmp(name, s->name) == 0) {
      chosen.store(s);
      return true;
    }
  }
  return false;
}

const Stages& stages() {
  if (!chosen.load()) choose_stages("auto");
  return *chosen.load();
}

void soap_forward(const SoapCall& call, const Sink& y, float* prepared, Pool& pool) {
  const Stages& s = stages();
  const Shape& shape = call.shape;
  const int P = shape.planes(), T = shape.frames, C = shape.channels;
  Laid laid;
  const Folded folded = fold_and_lay_out(s, call, pool, laid);
  Fuse& f = laid.fuse;
  f.y = y;
  f.offset = static_cast<float>(call.offset);
  if (!call.weights.cwem) return fuse_clips(s, f, 0, shape.clips, pool);

  float *means = prepared, *gates = prepared + shape.clips * P;
  f.gate = gates;
  const auto finish_gate = [&](int64_t clip, const double* mean) {
    Numbers gate(P);
    gate_forward(folded, T, C, mean, gate.data());
    std::copy(mean, mean + P, means + clip * P);
    std::copy(gate.begin(), gate.end(), gates + clip * P);
  };
  // A clip's means need all of it, and its pixels need the gate. Where there are clips enough, a thread does both for
  // one clip, and `fuse` finds x in the last-level cache; the rest is shared out plane by plane, then block by block.
  const int64_t threads = pool.threads(), whole = shape.clips / threads * threads;
  const int64_t blocks = s.blocks(shape.height, shape.width).blocks;
  share(pool, whole, [&](const auto& take) {
    const Scratch scratch(s.fuse_scratch(f));
    Numbers mean(P);
    for (int64_t n = take(); n >= 0; n = take()) {
      plane_means(s, call, n, 0, P, mean.data());
      finish_gate(n, mean.data());
      s.fuse(f, n, 0, blocks, scratch.get());
    }
  });
  if (whole == shape.clips) return;
  Numbers mean((shape.clips - whole) * P);
  constexpr int TOGETHER = 4;
  const int runs = (P + TOGETHER - 1) / TOGETHER;
  share_each(pool, (shape.clips - whole) * runs, [&](int64_t k) {
    const int first = static_cast<int>(k % runs) * TOGETHER;
    plane_means(s, call, whole + k / runs, first, std::min(TOGETHER, P - first), &mean[k / runs * P + first]);
  });
  for (int64_t n = whole; n < shape.clips; ++n) finish_gate(n, mean.data() + (n - whole) * P);
  fuse_clips(s, f, whole, shape.clips, pool);
}

namespace {

// The way back to x through conv and stencil: one convolution from the planes of dz (conv's outputs, then the stencil's
// slots) to those of x, with turned weights.
std::vector<float> turned_weights(
    const Shape& shape, const std::vector<float>& conv, const Numbers& stencil, bool interleaved) {
  const int T = shape.frames, C = shape.channels, P = shape.planes();
  const int from_conv = conv.empty() ? 0 : P, inputs = from_conv + (stencil.empty() ? 0 : T);
  std::vector<float> w(static_cast<size_t>(P) * inputs * 9, 0.f);
  for (int o = 0; o < from_conv; ++o)
    for (int i = 0; i < P; ++i)
      for (int k = 0; k < 9; ++k)
        w[(static_cast<size_t>(i) * inputs + o) * 9 + 8 - k] = conv[(static_cast<size_t>(o) * P + i) * 9 + k];
  if (stencil.empty()) return w;
  for (int slot = 0; slot < T; ++slot)
    for (int d = 0; d < 3; ++d) {
      const int t = slot + d - 1;
      if (t < 0 || t >= T) continue;
      for (int c = 0; c < C; ++c) {
        const int plane = interleaved ? c * T + t : t * C + c;
        for (int k = 0; k < 9; ++k)
          w[(static_cast<size_t>(plane) * inputs + from_conv + slot) * 9 + 8 - k] =
              static_cast<float>(stencil[d * 9 + k] / C);
      }
    }
  return w;
}

// How the sweep is cut into chunks with accumulators of their own, added up in order afterwards. By the work alone,
// never by the number of threads, so that the sum is the same bit for bit.
struct Chunks {
  int64_t clips, bands;  // clips per chunk, or bands per clip
  int64_t count;
};

Chunks chunks_of(const Shape& shape, int64_t blocks, size_t chunk_bytes) {
  // Enough to keep many cores busy and fp32 sums short, as long as the accumulators stay under 2 % of x (but 8: a
  // layer of many planes has them as big as its weights), and each chunk has work that outweighs its closing transform.
  const int64_t total = shape.clips * blocks;
  const double x_bytes = 4. * static_cast<double>(shape.clips * shape.planes()) * static_cast<double>(shape.pixels());
  const int64_t by_memory =
      std::max<int64_t>(8, static_cast<int64_t>(0.02 * x_bytes / static_cast<double>(chunk_bytes)));
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>({96, by_memory, total / 6}));
  Chunks c{1, 1, shape.clips};
  if (shape.clips >= wanted) {
    c.clips = (shape.clips + wanted - 1) / wanted;
    c.count = (shape.clips + c.clips - 1) / c.clips;
  } else {
    c.bands = bands_of(blocks, (wanted + shape.clips - 1) / shape.clips);
    c.count = shape.clips * c.bands;
  }
  return c;
}

PriorGradients sweep_all(const Stages& s, Sweep& w, Pool& pool) {
  const Shape& shape = w.forward.shape;
  const int P = shape.planes(), outputs = w.forward.conv.outputs;
  const int64_t blocks = s.blocks(shape.height, shape.width).blocks;
  const int I = outputs ? s.gradient_inputs(w.forward.conv.inputs) : 0, O = s.gradient_outputs(outputs);
  const size_t conv_size = static_cast<size_t>(9) * I * O;
  const Chunks chunks = chunks_of(shape, blocks, std::max<size_t>(conv_size * sizeof(float), 4096));
  Scratch conv(chunks.count * conv_size);
  Numbers bias(chunks.count * outputs), stencil(w.forward.stencil.weight ? chunks.count * 27 : 0);
  Numbers gate(shape.clips * chunks.bands * P, 0.);
  share(pool, chunks.count, [&](const auto& take) {
    const Scratch scratch(s.sweep_scratch(w));
    s.sweep_open(w, scratch.get());
    for (int64_t q = take(); q >= 0; q = take()) {
      s.sweep_begin(w, scratch.get());
      const int64_t first = chunks.bands > 1 ? q / chunks.bands : q * chunks.clips;
      const int64_t last = chunks.bands > 1 ? first + 1 : std::min(shape.clips, first + chunks.clips);
      const int64_t band = chunks.bands > 1 ? q % chunks.bands : 0;
      for (int64_t n = first; n < last; ++n)
        s.sweep(w, n, band_begin(blocks, band, chunks.bands), band_begin(blocks, band + 1, chunks.bands), scratch.get(),
            gate.data() + (n * chunks.bands + band) * P);
      s.sweep_end(w, scratch.get(),
          {conv.get() + q * conv_size, bias.data() + q * outputs, stencil.empty() ? nullptr : stencil.data() + q * 27});
    }
  });
  PriorGradients d;
  if (outputs) {
    d.conv.resize(static_cast<size_t>(outputs) * w.forward.conv.inputs * 9);
    d.conv_bias = reduce(bias, chunks.count);
    const int groups = (outputs + s.gradient_group(outputs) - 1) / s.gradient_group(outputs);
    const ConvPartials partials{w.forward.conv.inputs, outputs, I, O, O / groups, s.gradient_group(outputs)};
    share_each(pool, partials.inputs,
        [&](int64_t k) { reduce_conv(conv.get(), chunks.count, partials, static_cast<int>(k), d.conv.data()); });
  }
  if (!stencil.empty()) d.stencil = reduce(stencil, chunks.count);
  // By clip and plane: the bands of a clip, in order.
  d.gate.assign(shape.clips * P, 0.);
  for (int64_t n = 0; n < shape.clips; ++n)
    for (int64_t b = 0; b < chunks.bands; ++b)
      for (int p = 0; p < P; ++p) d.gate[n * P + p] += gate[(n * chunks.bands + b) * P + p];
  return d;
}

// A buffer for dz, if there is a way back to x through conv or stencil.
struct Back {
  std::vector<int64_t> planes;
  int inputs = 0;
  Scratch dz{0};
};

void open_back(Sweep& w, Back& back) {
  const Shape& shape = w.forward.shape;
  back.inputs = w.forward.conv.outputs + (w.forward.stencil.weight ? shape.frames : 0);
  if (!back.inputs) return;
  back.dz = Scratch(static_cast<size_t>(shape.clips) * back.inputs * shape.pixels());
  for (int p = 0; p < back.inputs; ++p) back.planes.push_back(p * shape.pixels());
  w.dz = {back.dz.get(), Dtype::f32, back.inputs * shape.pixels(), shape.width, 1, back.planes.data()};
}

Source source_of(const Sink& y) { return {y.data, y.dtype, y.clip, y.row, y.col, y.plane, nullptr, nullptr}; }

// dx = base + constant + conv back of dz.
void close_back(const Stages& s, const Sweep& w, const std::vector<float>& conv, const Numbers& stencil,
    const Back& back, const Source& base, const float* constant, const Sink& dx, Pool& pool) {
  Fuse f;
  f.shape = w.forward.shape;
  f.mode = Mode::linear;
  f.base = base;
  f.x = back.inputs ? source_of(w.dz) : base;
  f.y = dx;
  f.gate = constant;
  f.conv.strict = w.forward.conv.strict;
  Scratch laid(0);
  if (back.inputs) {
    const std::vector<float> turned = turned_weights(f.shape, conv, stencil, w.forward.stencil.interleaved);
    laid = lay_out(s, turned, back.inputs, f.shape.planes(), f.conv.strict, 1., pool);
    f.conv.inputs = back.inputs;
    f.conv.outputs = f.shape.planes();
    f.conv.weight = laid.get();
  }
  fuse_clips(s, f, 0, f.shape.clips, pool);
}

}  // namespace

std::vector<Numbers> soap_backward(
    const SoapCall& call, const Source& grad, const float* prepared, const Sink& dx, bool needs_weights, Pool& pool) {
  const Stages& s = stages();
  const Shape& shape = call.shape;
  const int P = shape.planes(), T = shape.frames, C = shape.channels;
  Laid laid;
  const Folded folded = fold_and_lay_out(s, call, pool, laid);
  Sweep w;
  w.forward = laid.fuse;
  w.grad = grad;
  Back back;
  if (dx.data) open_back(w, back);
  const PriorGradients d = sweep_all(s, w, pool);

  FoldedGradients g{d.stencil, Numbers(folded.taps.size(), 0.), Numbers(folded.bias.size(), 0.), d.conv, d.conv_bias};
  std::vector<float> constant;
  if (call.weights.cwem) {
    Numbers mean(P), gate(P), dmean(P);
    constant.resize(shape.clips * P);
    for (int64_t n = 0; n < shape.clips; ++n) {
      std::copy(prepared + n * P, prepared + (n + 1) * P, mean.begin());
      const float* from = prepared + (shape.clips + n) * P;
      std::copy(from, from + P, gate.begin());
      gate_backward(folded, T, C, mean.data(), gate.data(), d.gate.data() + n * P, g, dmean.data());
      for (int p = 0; p < P; ++p)
        constant[n * P + p] = static_cast<float>(dmean[p] / static_cast<double>(shape.pixels()));
    }
  }
  if (dx.data)
    close_back(s, w, folded.conv, folded.stencil, back, grad, constant.empty() ? nullptr : constant.data(), dx, pool);
  return needs_weights ? unfold(call.weights, g, each_of(shape, pool)) : std::vector<Numbers>{};
}

namespace {

void lay_out(const Stages& s, const PriorsCall& call, Pool& pool, Laid& laid) {
  lay_out(s, call.shape, call.x, call.strict, {&call.stencil, &call.conv, &call.conv_bias, 0}, pool, laid);
  laid.fuse.mode = call.multiplicative ? Mode::multiplicative : Mode::additive;
  laid.fuse.offset = static_cast<float>(call.offset);
  laid.fuse.stencil.interleaved = call.interleaved;
  laid.fuse.gate = call.gate.empty() ? nullptr : call.gate.data();
}

}  // namespace

void fuse_priors_forward(const PriorsCall& call, const Sink& y, Pool& pool) {
  const Stages& s = stages();
  Laid laid;
  lay_out(s, call, pool, laid);
  laid.fuse.y = y;
  fuse_clips(s, laid.fuse, 0, call.shape.clips, pool);
}

PriorGradients fuse_priors_backward(const PriorsCall& call, const Source& grad, const Sink& dx, Pool& pool) {
  const Stages& s = stages();
  Laid laid;
  lay_out(s, call, pool, laid);
  Sweep w;
  w.forward = laid.fuse;
  w.grad = grad;
  Back back;
  Source base = grad;
  if (dx.data) {
    open_back(w, back);
    if (call.multiplicative) {
      w.dbase = dx;
      base = source_of(dx);
    }
  }
  PriorGradients d = sweep_all(s, w, pool);
  if (dx.data && (back.inputs || !call.multiplicative))
    close_back(s, w, call.conv, call.stencil, back, base, nullptr, dx, pool);
  return d;
}

void window_sums_forward(const Shape& shape, const Source& x, float* out, Pool& pool) {
  const Stages& s = stages();
  const int64_t planes = shape.planes();
  share_each(pool, shape.clips * planes, [&](int64_t k) {
    s.window_sums(x, k / planes, static_cast<int>(k % planes), shape.height, shape.width, out + k * 9);
  });
}

void window_sums_backward(const Shape& shape, const float* grad, const Sink& dx, Pool& pool) {
  const Stages& s = stages();
  const int64_t planes = shape.planes();
  share_each(pool, shape.clips * planes, [&](int64_t k) {
    s.window_sums_backward(dx, k / planes, static_cast<int>(k % planes), shape.height, shape.width, grad + k * 9);
  });
}

}  // namespace soap::cpu
