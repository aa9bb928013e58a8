// The stages of the CPU backend: what each takes, and the table by which one instruction set offers them.
//
// Names follow soap_kernels: a clip has T frames of C channels; a plane is one channel of one frame, and plane
// t * C + c stands for channel c of frame t. Stages: prepare, fuse (forward); sweep, reduce, finish (backward).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace soap::cpu {

enum class Dtype : int32_t { f32, f16, bf16, u8 };

struct Shape {
  int64_t clips = 0;
  int frames = 0, channels = 0, height = 0, width = 0;

  int planes() const { return frames * channels; }
  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

// A batch of clips in memory: strides in elements, 64 bit; plane[t * C + c] is where that plane starts. An element is
// read as scale[plane] * value + shift[plane] if scale is set (uint8 frames, normalised), and padding is zero after it.
struct Source {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t clip = 0, row = 0, col = 0;
  const int64_t* plane = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

struct Sink {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t clip = 0, row = 0, col = 0;
  const int64_t* plane = nullptr;
};

// A zero-padded 3x3 convolution from `inputs` to `outputs` planes, its weights laid out for the product by `layout`.
struct Conv {
  int inputs = 0, outputs = 0;
  bool strict = false;    // the direct form: no transform, the error of an ordinary fp32 convolution
  int centre_inputs = 0;  // the first so many inputs have nothing but a centre tap (frame 0 of HMEM)
  const float* weight = nullptr;
  const float* bias = nullptr;  // by output, already times `factor` of the layout; null: none
};

// The 3x3x3 stencil on means over channels. Slot t of the mean takes the planes t * C + c, or, interleaved, c * T + t;
// its prior goes to the planes t * C + c either way.
struct Stencil {
  const float* weight = nullptr;  // for the product, by `layout`: 3 taps in time for each point; null: none
  bool interleaved = false;
};

enum class Mode {
  additive,        // y = x + offset + gate + s(stencil) + s(conv)
  multiplicative,  // y = x * the same sum
  linear,          // y = base + gate + conv: the way of a gradient back to x; source and base differ
};

struct Fuse {
  Shape shape;  // of y; the conv may read another number of planes
  Mode mode = Mode::additive;
  float offset = 0;
  Source x;     // what conv and stencil read
  Source base;  // what y adds to; equals x unless linear
  Sink y;
  const float* gate = nullptr;  // by clip and plane; null: none
  Conv conv;                    // outputs 0: none
  Stencil stencil;
};

// One pass over x and the gradient, for a run of units of work that share the accumulators of one chunk.
struct Sweep {
  Fuse forward;  // y is not used
  Source grad;
  Sink dz;  // gradients of what the sigmoids take, (clips, conv outputs + stencil slots, H, W); data null: not wanted
  Sink dbase;  // multiplicative: grad times the sum; data null: not wanted
};

struct ChunkGradients {
  float* conv = nullptr;      // (9, padded inputs, padded outputs), as `Stages::gradient_inputs/outputs` pad them
  double* bias = nullptr;     // by output
  double* stencil = nullptr;  // 27
};

// Work is cut into blocks of 4 segments of L pixels x 4 rows: 4 L / 4 = L tiles of 4x4, one in each lane.
struct Blocks {
  int tile_rows = 0, segments_per_row = 0;
  int64_t segments = 0, blocks = 0;
};

inline constexpr double LOG2E = 1.4426950408889634074;

struct Stages {
  const char* name;
  int lanes;

  Blocks (*blocks)(int height, int width);

  // prepare
  void (*window_sums)(const Source& x, int64_t clip, int plane, int height, int width, float* out /* 9 */);
  void (*plane_sums)(const Source& x, int64_t clip, int first, int count, int height, int width, double* out);
  // dx of one plane from the gradient of its 9 sums.
  void (*window_sums_backward)(const Sink& dx, int64_t clip, int plane, int height, int width, const float* grad);
  // Lays out weight[o][i][9] times factor, for a group of outputs out of conv_groups, each of conv_group_size floats.
  int (*conv_groups)(int outputs);
  size_t (*conv_group_size)(int inputs, bool strict);
  void (*layout_conv)(const float* weight, int inputs, int outputs, bool strict, double factor, int group, float* out);
  void (*layout_stencil)(const double* weight /* 27 */, int channels, bool strict, double factor, float* out /* 108 */);

  // fuse: blocks [first, last) of a clip
  size_t (*fuse_scratch)(const Fuse&);
  void (*fuse)(const Fuse&, int64_t clip, int64_t first, int64_t last, float* scratch);

  // sweep
  // Inputs and outputs are padded; outputs go in groups of gradient_group, each padded for itself.
  int (*gradient_inputs)(int inputs);
  int (*gradient_outputs)(int outputs);
  int (*gradient_group)(int outputs);
  size_t (*sweep_scratch)(const Sweep&);
  void (*sweep_open)(const Sweep&, float* scratch);   // once for a scratch
  void (*sweep_begin)(const Sweep&, float* scratch);  // once for a chunk
  void (*sweep)(const Sweep&, int64_t clip, int64_t first, int64_t last, float* scratch, double* gate);
  void (*sweep_end)(const Sweep&, float* scratch, const ChunkGradients&);
};

namespace plain { extern const Stages stages; }
namespace avx2 { extern const Stages stages; }
namespace avx512 { extern const Stages stages; }

}  // namespace soap::cpu
