// What every native backend of SOAP shares: the shape of the work and the types its tensors may have.
//
// Names follow soap_kernels: a clip has T frames of C channels; a plane is one channel of one frame, and plane
// t * C + c stands for channel c of frame t. Stages: prepare, fuse (forward); sweep, reduce, finish (backward).
#pragma once

#include <cstdint>

namespace soap {

enum class Dtype : int32_t { f32, f16, bf16, u8 };

enum Part : int64_t { kThreeDem = 1, kCwem = 2, kHmem = 4 };

struct Shape {
  int64_t clips = 0;
  int frames = 0;
  int channels = 0;
  int height = 0;
  int width = 0;

  int planes() const { return frames * channels; }
  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

}  // namespace soap
