// A CUDA device played by main memory, for a build of torch without CUDA: tensors say that they are on cuda:0 and count
// as memory of the card; their kernels are the CPU's. It must be loaded before torch is imported.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>

namespace {
using at::Tensor;
const c10::Device CARD(c10::kCUDA, 0), HOST(c10::kCPU);
std::atomic<int64_t> taken{0}, peak{0}, limit{INT64_MAX};  // bytes of the card

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return CARD; }
  c10::Device getDevice() const override { return CARD; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, CARD); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar registered(c10::kCUDA, &guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
};

// The same memory under another device's name; it stays as long as somebody looks at it.
Tensor named(const Tensor& t, c10::Device device) {
  if (!t.defined() || t.device() == device) return t;
  const auto& there = t.storage();
  int64_t size = device == CARD ? there.nbytes() : 0, now = taken += size;
  auto* held = new std::pair<Tensor, int64_t>(t, size);
  auto drop = [](void* held) {
    taken -= static_cast<std::pair<Tensor, int64_t>*>(held)->second;
    delete static_cast<std::pair<Tensor, int64_t>*>(held);
  };
  c10::DataPtr memory(there.mutable_data(), held, drop, device);
  TORCH_CHECK_WITH(OutOfMemoryError, now <= limit, "CUDA out of memory");
  for (int64_t most = peak; most < now && !peak.compare_exchange_weak(most, now);) {}
  c10::Storage storage(c10::Storage::use_byte_size_t(), there.nbytes(), std::move(memory), c10::GetAllocator(c10::kCPU), true);
  c10::DispatchKeySet key(device == CARD ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), key, t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

// What a kernel wrote to, with the size that it was given.
Tensor grown(const Tensor& written, const Tensor& there) {
  if (written.defined() && written.sizes() != there.sizes()) {
    auto* impl = written.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(named(there, CARD).storage());
    impl->set_sizes_and_strides(there.sizes(), there.strides(), there.storage_offset());
  }
  return written;
}

// Every kernel that nobody wrote for the card: the CPU's, on the same memory.
void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  bool indexes = schema.name().find("index") != std::string::npos;  // by tensors that may lie anywhere
  auto host = [&](const Tensor& t) {
    TORCH_CHECK(!t.defined() || t.is_cuda() || t.dim() == 0 || indexes, "Expected all tensors to be on the same device, ",
                "but found at least two devices, cuda:0 and cpu! (", schema.name(), ")");
    return named(t, HOST);
  };
  auto given = torch::jit::pop(*stack, schema.arguments().size()), lent = given;
  bool for_card = true;
  for (auto& value : lent) {
    if (value.isTensor()) {
      value = host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(host(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(host(*t)) : t);
      value = list;
    } else if (value.isDevice()) {
      for_card = value.toDevice().is_cuda();
      value = HOST;
    }
    stack->push_back(value);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (size_t i = 0; i < results.size(); i++) {
    auto* alias = schema.returns()[i].alias_info();
    for (size_t a = 0; alias && alias->isWrite() && a < given.size(); a++) {
      auto* other = schema.arguments()[a].alias_info();
      if (other && *other == *alias) results[i] = grown(given[a].toTensor(), lent[a].toTensor());
    }
    if (results[i].isTensor() && for_card) results[i] = named(results[i].toTensor(), CARD);
    stack->push_back(results[i]);
  }
}

Tensor& copy(Tensor& to, const Tensor& from, bool) {
  named(to, HOST).copy_(named(from, HOST));
  return to;
}

int64_t plain_sdpa(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                   std::optional<double>, bool) {
  return 0;  // which in torch's own numbering is the one made of matrix products
}
}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", copy);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("_fused_sdp_choice", plain_sdpa);
  for (auto name : {"convolution", "convolution_backward", "silu_backward"})  // else in terms of others
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

extern "C" int64_t bytes_taken() { return taken; }
extern "C" int64_t bytes_peak() { return peak; }
extern "C" void forget_peak() { peak = taken.load(); }
extern "C" void allow_bytes(int64_t bytes) { limit = bytes; }
