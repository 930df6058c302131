"""What verl asks of a platform, answered for a CPU. Importing this module registers the platform with verl."""

import types
from contextlib import contextmanager

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class CpuDeviceId(str):
    """verl uses a device id both as x.to(id) and inside f"{device_name}:{id}"."""

    def __new__(cls):
        return super().__new__(cls, "cpu")

    def __format__(self, spec):
        return format("0", spec)


DEVICE_ID = CpuDeviceId()


def nothing(*args, **kwargs):
    return None


def zero(*args, **kwargs):
    return 0


class CpuModule(types.ModuleType):
    """torch.cpu plus the functions of torch.cuda that verl calls unconditionally."""

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    def __eq__(self, other):
        return other is self or other is torch.cpu

    __hash__ = types.ModuleType.__hash__

    @staticmethod
    def is_available():
        return False  # "no accelerator": verl then skips its bookkeeping of device memory

    @staticmethod
    def current_device():
        return DEVICE_ID

    @staticmethod
    def mem_get_info(*args, **kwargs):
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_device_name(*args, **kwargs):
        return "CPU"

    @staticmethod
    def get_rng_state(*args, **kwargs):
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, *args, **kwargs):
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed
    set_device = empty_cache = ipc_collect = reset_peak_memory_stats = staticmethod(nothing)
    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = staticmethod(zero)


@PlatformRegistry.register(platform="cpu")
class PlatformCpu(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuModule("iapo_torch_cpu")

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return False  # never picked by verl's detection, only by name

    def current_device(self):
        return DEVICE_ID

    def device_count(self):
        return 1

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def ray_resource_name(self):
        return "GPU"  # a logical Ray resource: ray_init.num_gpus counts worker slots, not devices

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        return False  # weights then travel to vLLM through shared memory

    set_device = synchronize = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing
