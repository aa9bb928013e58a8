// The CUDA kernels of SOAP as plain host functions: no torch, no CUDA types in the arguments but the stream.
//
// Frames are clips (B, T, C, H, W). A plane is one channel of one frame. Frames are worked on in blocks of 8
// ("octets"). In the folded 3x3 convolution, with CP for C rounded up to 1 or 3:
//   column ((t / 8) * CP + c) * 8 + t % 8        is plane (t, c);
//   row    ((t / 8) * (CP + 1) + j) * 8 + t % 8  is HMEM's prior of plane (t, j) or, with j = CP, 3DEM's of frame t.
// A group of 8 lanes of an MMA fragment then holds one octet of one channel.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SOAP_BOTH __host__ __device__
#else
#define SOAP_BOTH
#endif

namespace soap::cuda {

constexpr int MAX_CHANNELS = 3;  // more go to a library convolution
constexpr int MAX_TUPLE_SIZES = 8;
constexpr int MAX_STRICT_FRAMES = 8;
constexpr int SEGMENTS = 8;  // a plane's mean is the sum of so many partial sums
constexpr float LOG2E = 1.4426950408889634f;

enum Dtype : int { F32 = 0, F16 = 1, BF16 = 2, U8 = 3 };

// How the convolution is multiplied out. BF16X3: hi*hi + lo*hi + hi*lo. EXACT: fp32 FMA, no tensor cores.
enum Mode : int { BF16X1 = 0, BF16X3 = 1, F16X1 = 2, EXACT = 3 };

struct Array {  // contiguous
  void* data;
  int dtype;
};

struct Frames {  // strides in elements, of (B, T, C, H, W)
  void* data;
  int64_t clip, frame, channel, row, column;
  int dtype;
};

struct Shape {
  int64_t clips;
  int frames, channels, height, width;
};

// Weights of the parts that are on. Folded: SOAP's own (motion .. restore, cwem). Direct: conv and conv_bias as given.
struct Weights {
  Array stencil;  // (3, 3, 3)
  Array expand, temporal, temporal_bias, squeeze;
  Array motion[MAX_TUPLE_SIZES], motion_bias[MAX_TUPLE_SIZES];
  Array project[MAX_TUPLE_SIZES], project_bias[MAX_TUPLE_SIZES];
  Array restore, restore_bias;
  Array conv, conv_bias;  // (TC, TC, 3, 3), (TC) or null
  Array gate;             // (B, T, C), after its sigmoid
  int tuple_sizes[MAX_TUPLE_SIZES];
  int num_sizes, num_maps, hidden;
};

struct Options {
  bool stencil, cwem, hmem;  // parts of SOAP
  bool direct, given_gate;   // fuse_priors: weights given as they are
  bool multiplicative, interleaved;
  float offset;  // what the sum of the priors starts from
  int mode;
  float scale[MAX_CHANNELS] = {1.f, 1.f, 1.f}, shift[MAX_CHANNELS];  // uint8 input: value * scale + shift

  // Whether frames of fp16 or uint8 go as two bf16 terms backward, too: the range of a gradient is not fp16's.
  SOAP_BOTH bool split(int x_dtype, int grad_dtype) const {
    return mode == BF16X3 || x_dtype == F16 || (x_dtype == U8 && grad_dtype == F32);
  }
  SOAP_BOTH bool conv() const { return hmem || direct; }
  SOAP_BOTH bool gate() const { return cwem || given_gate; }
  SOAP_BOTH bool rows() const { return conv() || stencil; }  // anything for the convolution to do
};

// A call, as every stage takes it.
struct Call {
  Shape shape;
  Frames x;
  Options options{};
  Weights weights{};
};

// Where things lie in `prepared`, in floats, each at a multiple of 4.
struct Layout {
  int octets, padded_channels;  // FB, CP
  int rows, columns;            // of the folded convolution, padding included
  int words;                    // 32-bit words of one term of the packed weights: bf16 or fp16 pairs
  int64_t means, taps, bias, scale, packed, total;
};

SOAP_BOTH inline int64_t align4(int64_t n) { return (n + 3) / 4 * 4; }

inline int packed_terms(int mode) { return mode == BF16X1 ? 1 : mode == BF16X3 ? 2 : mode == F16X1 ? 3 : 2; }

// F16X1 keeps two bf16 terms for the backward, then the fp16 one. EXACT keeps fp32: twice the words of a term.
inline Layout layout(const Shape& s, const Options& o) {
  Layout l;
  l.octets = (s.frames + 7) / 8;
  l.padded_channels = s.channels <= 1 ? 1 : 3;
  l.rows = l.octets * (l.padded_channels + 1) * 8;
  l.columns = l.octets * l.padded_channels * 8;
  l.words = o.rows() ? 9 * l.rows * l.columns / 2 : 0;
  int64_t planes = s.clips * s.frames * s.channels;
  l.taps = 0;
  l.bias = l.taps + align4(o.cwem ? 3 * s.channels * s.channels + s.channels : 0);
  l.scale = l.bias + l.rows;
  l.packed = l.scale + l.rows;
  l.means = l.packed + int64_t(l.words) * packed_terms(o.mode);
  l.total = l.means + align4(o.cwem ? planes * SEGMENTS : 0);
  return l;
}

// Rows of partial sums that a sweep leaves: `blocks` a clip, each `numel` floats a pair of octets; `gates` beside them.
struct SweepPlan {
  int tiles_across, tiles_down;   // of a clip
  int blocks;                     // a clip
  int64_t numel;                  // 9 * rows of an octet * columns of an octet + rows of an octet
  int64_t partial, gate_partial;  // floats in all
  int64_t sums, gates;            // floats after `reduce`
};

SweepPlan plan_sweep(const Shape&, const Options&);

// What folding, forward and backward of an instance need: bytes of shared memory of the largest block.
size_t shared_memory(const Call&, int grad_dtype);

// dense: the folded weights once more, plain, ((C + 1) * T, TC, 3, 3); null unless wanted.
void prepare(const Call&, float* prepared, float* dense, void* stream);
void fuse(const Call&, const float* prepared, const Frames& y, void* stream);
// dz: (B, (C + 1) * T, H, W) fp32 of rows j * T + t, and through: (B, T, C, H, W) fp32, what reaches x past the priors
// of the multiplicative form; both null unless x needs a gradient.
void sweep(const Call&, const Frames& grad, const float* prepared, float* partial, float* gate_partial, float* dz,
    float* through, void* stream);
void reduce(const Call&, const float* prepared, const float* partial, const float* gate_partial, float* sums,
    float* gates, void* stream);
// dweights: an Array per member of Weights that is on. dmeans: (B, T, C) gradient of the plane means, or null.
void finish(const Call&, const float* prepared, const float* sums, const float* gates, const Weights& dweights,
    float* dmeans, void* stream);

// x: (N, C, H, W) as Frames with clip = image, frame = unused (1), channel.
void window_sums(int64_t images, int channels, int height, int width, const Frames& x, float* sums, void* stream);
void window_sums_backward(int64_t planes, int height, int width, const float* grad, void* dx, int dtype, void* stream);

// Around a library's convolution, for planes too many for one tile. z: (B, rows, H, W), its output without the bias.
struct Wide {
  Array z;            // rows of HMEM's planes (frame-major) if `planes`, then of 3DEM's frames if `stencil`
  const float* bias;  // (T * C) or null
  const float* gate;  // (B, T, C) or null
  bool planes, stencil, multiplicative;
  float offset;
  void* dz;       // backward: like z
  float* direct;  // backward, multiplicative: (B, T, C, H, W), what reaches x past the priors; null unless needed
  float* shares;  // backward: (2, B, T, C, chunks), sums over pixels of the gates' and of the bias' gradient

  SOAP_BOTH int rows(const Shape& s) const { return (planes ? s.frames * s.channels : 0) + (stencil ? s.frames : 0); }
};
int wide_chunks(const Shape&, const Frames& x, const Frames& other);
void join(const Wide&, const Shape&, const Frames& x, const Frames& y, void* stream);
void join_backward(const Wide&, const Shape&, const Frames& x, const Frames& grad, void* stream);

int64_t launches();  // kernels launched so far by this library
}  // namespace soap::cuda
