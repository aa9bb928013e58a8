// The exact folds and their adjoints, in double (soap_kernels/fold.py has the same in PyTorch, with the derivation).
// A few thousand multiplies for frames, where the caller's `Each` is a plain loop: one thread, microseconds. On
// features (512 planes: 60 million) the tasks are shared out; none of them changes with the number of threads.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "stages.h"

namespace soap::cpu {

using Numbers = std::vector<double>;
// Does task(0) .. task(count - 1), which are independent, in any order.
using Each = std::function<void(int count, const std::function<void(int)>& task)>;

// The weights of the parts that are on, in state_dict order, each contiguous.
struct Weights {
  int frames = 0, channels = 0, hidden = 0;
  bool three_dem = false, cwem = false;
  std::vector<int> tuple_sizes;  // HMEM's; none: it is off
  std::vector<Numbers> tensor;

  bool hmem() const { return !tuple_sizes.empty(); }
  size_t cwem_at() const { return three_dem ? 1 : 0; }  // where a part's first tensor is
  size_t hmem_at() const { return cwem_at() + (cwem ? 4 : 0); }
};

struct Folded {
  Numbers stencil;     // (3, 3, 3)
  Numbers taps, bias;  // CWEM before its sigmoid: (3, C, C), (C)
  std::vector<float> conv;
  Numbers conv_bias;  // HMEM before its sigmoid: (TC, TC, 3, 3), (TC)
};

// Also used for gradients: the same shapes, `conv` in double.
struct FoldedGradients { Numbers stencil, taps, bias, conv, conv_bias; };

Folded fold(const Weights& w, const Each& each);

// The gradients of the weights, in the order and shapes of w.tensor.
std::vector<Numbers> unfold(const Weights& w, const FoldedGradients& d, const Each& each);

// CWEM's gate (T, C) of one clip from its means (T, C).
void gate_forward(const Folded& f, int frames, int channels, const double* means, double* gate);

// Adds to d.taps and d.bias, and gives the gradient of the means.
void gate_backward(const Folded& f, int frames, int channels, const double* means, const double* gate,
    const double* dgate, FoldedGradients& d, double* dmeans);

}  // namespace soap::cpu
