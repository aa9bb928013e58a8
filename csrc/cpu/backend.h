// The CPU backend without tensors: the stages in their order, shared out to threads. What ops.cpp calls, and what the
// sanitizer tests drive without PyTorch.
#pragma once

#include <functional>
#include <vector>

#include "fold.h"
#include "stages.h"

namespace soap::cpu {

// Threads that take numbered tasks. Which thread takes which task never changes a result.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  // Calls body once on each of at most `threads` threads, all at the same time where it can.
  virtual void spread(int threads, const std::function<void()>& body) = 0;
};

// The instruction set in use: the best this machine has, unless a lower one was asked for.
const Stages& stages();
std::vector<const Stages*> available_stages();
bool choose_stages(const char* name);  // "auto" or a name; false: unknown or not on this machine

struct SoapCall {
  Shape shape;
  Source x;
  Weights weights;
  bool strict = false;
  double offset = 0;  // forward: what the sum of the priors starts from
};

// `prepared`, if CWEM is on: the means of all planes, then their gates (soap_kernels/backends/cpp.py makes room).
void soap_forward(const SoapCall& call, const Sink& y, float* prepared, Pool& pool);

// The gradients of the weights, as SoapCall::weights.tensor; none unless wanted. dx.data null: not wanted.
std::vector<Numbers> soap_backward(
    const SoapCall& call, const Source& grad, const float* prepared, const Sink& dx, bool needs_weights, Pool& pool);

// Priors given as they are. Null or empty: not there.
struct PriorsCall {
  Shape shape;
  Source x;
  bool strict = false, multiplicative = false, interleaved = false;
  double offset = 0;
  Numbers stencil;          // (3, 3, 3)
  std::vector<float> gate;  // by clip and plane
  std::vector<float> conv;  // (TC, TC, 3, 3)
  Numbers conv_bias;        // (TC)
};
void fuse_priors_forward(const PriorsCall& call, const Sink& y, Pool& pool);

struct PriorGradients { Numbers stencil, gate, conv, conv_bias; };
PriorGradients fuse_priors_backward(const PriorsCall& call, const Source& grad, const Sink& dx, Pool& pool);

// x: (N, C, H, W) as a shape of one frame. out: (N, C, 3, 3).
void window_sums_forward(const Shape& shape, const Source& x, float* out, Pool& pool);
void window_sums_backward(const Shape& shape, const float* grad, const Sink& dx, Pool& pool);

}  // namespace soap::cpu
