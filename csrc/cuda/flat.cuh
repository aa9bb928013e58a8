// SOAP's weights as floats in shared memory: a block of `prepare` or `finish` fetches them all at once, whatever their
// dtype, instead of waiting for one load after another.
#pragma once
#include "tile.cuh"

namespace soap::cuda {

constexpr int MAX_ARRAYS = 7 + 4 * MAX_TUPLE_SIZES;

struct FlatWeights {
  Array array[MAX_ARRAYS];
  int begin[MAX_ARRAYS + 1];  // in floats
  int count = 0;
  bool floats = true;  // all of them fp32
  // Where each begins.
  int stencil = 0, expand = 0, temporal = 0, temporal_bias = 0, squeeze = 0, restore = 0, restore_bias = 0;
  int motion[MAX_TUPLE_SIZES], motion_bias[MAX_TUPLE_SIZES], project[MAX_TUPLE_SIZES], project_bias[MAX_TUPLE_SIZES];

  int total() const { return begin[count]; }

  explicit FlatWeights(const Call& call) {
    const Weights& w = call.weights;
    const Options& o = call.options;
    begin[0] = 0;
    const auto add = [this](const Array& a, int64_t numel) {
      array[count] = a;
      floats = floats && a.dtype == F32;
      begin[count + 1] = begin[count] + int(numel);
      return begin[count++];
    };
    const int C = call.shape.channels, R = w.hidden;
    if (o.stencil) stencil = add(w.stencil, 27);
    if (o.cwem) {
      expand = add(w.expand, R * C);
      temporal = add(w.temporal, int64_t(R) * R * 3);
      temporal_bias = add(w.temporal_bias, R);
      squeeze = add(w.squeeze, C * R);
    }
    if (o.hmem) {
      for (int k = 0; k < w.num_sizes; ++k) {
        const int planes = w.tuple_sizes[k] * C;
        motion[k] = add(w.motion[k], int64_t(planes) * planes * 9);
        motion_bias[k] = add(w.motion_bias[k], planes);
        project[k] = add(w.project[k], C * planes);
        project_bias[k] = add(w.project_bias[k], C);
      }
      restore = add(w.restore, int64_t(call.shape.frames) * w.num_maps);
      restore_bias = add(w.restore_bias, call.shape.frames);
    }
  }

  // All threads of the block; a barrier has to follow.
  __device__ __forceinline__ void load(float* shared) const {
    const int n = begin[count];
    int a = 0;
    if (floats) {
#pragma unroll 4
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        while (i >= begin[a + 1]) ++a;
        shared[i] = static_cast<const float*>(array[a].data)[i - begin[a]];
      }
    } else {
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        while (i >= begin[a + 1]) ++a;
        shared[i] = load_any(array[a], i - begin[a]);
      }
    }
  }
};

}  // namespace soap::cuda
