// Lets a build of PyTorch for the CPU have tensors that say they are on a GPU: it asks whoever has
// registered for their kind which device is the current one of a thread, and how it is changed.
// Autograd asks the second of the two, which must be loaded before PyTorch itself to be found.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Guard());

struct CUDAHooks : at::CUDAHooksInterface {
    CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
    at::DeviceIndex deviceCount() const override { return 2; }
    at::DeviceIndex getCurrentDevice() const override { return Guard::getDeviceIndex(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

extern "C" int current_device() { return Guard::getDeviceIndex(); }
extern "C" void set_device(int index) { Guard::setDeviceIndex(static_cast<at::DeviceIndex>(index)); }
