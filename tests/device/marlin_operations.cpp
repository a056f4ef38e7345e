// The three operations of test_marlin.py, around gptqmodel's copy of vLLM's Marlin kernel.
#include <torch/library.h>

#include <optional>

#include "awq_marlin_repack.cuh"
#include "core/scalar_type.hpp"
#include "gptq_marlin_repack.cuh"

using Tensor = torch::Tensor;
using Maybe = std::optional<Tensor>;

// Defined in gptq_marlin.cu, which has no header.
Tensor gptq_marlin_gemm(Tensor& a, Maybe c, Tensor& weight, Maybe const& bias, Tensor& scales,
                        Maybe const& global_scale, Maybe const& zeros, Maybe const& index,
                        Maybe const& order, Tensor& workspace, vllm::ScalarTypeId const& kind,
                        int64_t m, int64_t n, int64_t k, bool whole_k, bool atomic_add,
                        bool float32_sums, bool float_zeros, Maybe c_scratch, Maybe a_scratch);

namespace {

Tensor gemm(Tensor a, Tensor weight, Tensor scales, Maybe const& global_scale, Maybe const& zeros,
            Maybe const& index, Maybe const& order, Tensor workspace, int64_t kind, int64_t m,
            int64_t n, int64_t k) {
  return gptq_marlin_gemm(a, std::nullopt, weight, std::nullopt, scales, global_scale, zeros, index,
                          order, workspace, static_cast<vllm::ScalarTypeId>(kind), m, n, k, true,
                          false, true, false, std::nullopt, std::nullopt);
}

Tensor gptq_repack(Tensor words, Tensor order, int64_t k, int64_t n, int64_t bits) {
  return gptq_marlin_repack(words, order, k, n, bits);
}

Tensor awq_repack(Tensor words, int64_t k, int64_t n, int64_t bits) {
  return awq_marlin_repack(words, k, n, bits);
}

}  // namespace

TORCH_LIBRARY(advisor_marlin, m) {
  m.def(
      "gemm(Tensor a, Tensor weight, Tensor scales, Tensor? global_scale, Tensor? zeros, "
      "Tensor? index, Tensor? order, Tensor(a!) workspace, int kind, int m, int n, int k) -> Tensor");
  m.def("gptq_repack(Tensor words, Tensor order, int k, int n, int bits) -> Tensor");
  m.def("awq_repack(Tensor words, int k, int n, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(advisor_marlin, CUDA, m) {
  m.impl("gemm", &gemm);
  m.impl("gptq_repack", &gptq_repack);
  m.impl("awq_repack", &awq_repack);
}
