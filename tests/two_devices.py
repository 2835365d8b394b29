"""A stand-in for CuPy with two devices, on NumPy's arrays: what is current, what is allocated where, streams, and graphs that record."""

import contextlib
from types import ModuleType, SimpleNamespace

import numpy as np

CAPABILITIES = ((8, 0), (9, 0))


class Cupy(ModuleType):
    """The module `cupy`. `current` is the device; `allocated` lists (device, array) of each call of `empty`."""

    ndarray = np.ndarray
    uint8 = np.uint8

    def __init__(self, nvrtc=None, kernel=None):
        super().__init__("cupy")
        self.current, self.allocated, self.asked = 0, [], []
        self.__spec__ = SimpleNamespace(name="cupy")
        runtime = SimpleNamespace(
            getDevice=lambda: self.current, getDeviceProperties=self.properties, getDeviceCount=lambda: len(CAPABILITIES),
            CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {}),
        )  # fmt: skip
        stream = SimpleNamespace(ptr=7, synchronize=lambda: None, is_capturing=lambda: False)
        self.cuda = SimpleNamespace(
            runtime=runtime, nvrtc=nvrtc, Device=lambda number=None: Device(self, self.current if number is None else number),
            get_current_stream=lambda: stream, Stream=Stream, MemoryPool=Pool, using_allocator=lambda _: contextlib.nullcontext(),
        )  # fmt: skip
        self.get_default_memory_pool = Pool
        self.RawModule = lambda path: SimpleNamespace(get_function=lambda name: kernel(self.current, path, name))
        self.launched = []  # the devices on which graphs were launched

    def properties(self, device):
        self.asked.append(device)
        major, minor = CAPABILITIES[device]
        return {"name": b"Some Card", "major": major, "minor": minor}

    def empty(self, size, dtype):
        array = Memory(np.zeros(size, dtype))
        self.allocated.append((self.current, array))
        return array


class Memory:
    """An array that can be referred to weakly, with its address as CuPy gives it."""

    def __init__(self, host):
        self.host = host
        self.data = SimpleNamespace(ptr=host.ctypes.data)


class Device:
    """`with Device(cupy, 1):` makes it the current one."""

    def __init__(self, cupy, number):
        self.cupy, self.number, self.before = cupy, number, []

    def __enter__(self):
        self.before.append(self.cupy.current)
        self.cupy.current = self.number

    def __exit__(self, *error):
        self.cupy.current = self.before.pop()


class Pool:
    malloc = None

    def free_all_blocks(self):
        pass


class Stream:
    """Records nothing but that its graph is launched, on which device."""

    def __init__(self, non_blocking):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass

    def begin_capture(self):
        pass

    def end_capture(self):
        import cupy

        return SimpleNamespace(launch=lambda stream: cupy.launched.append(cupy.current))


class Library:
    """cuBLAS: gives each handle a number, and writes down every call with plain numbers."""

    def __init__(self, cupy):
        self.cupy, self.created, self.calls = cupy, [], []

    def cublasCreate_v2(self, handle):
        self.created.append(self.cupy.current)
        handle._obj.value = len(self.created)
        return 0

    def __getattr__(self, name):
        def call(handle, *args):
            self.calls.append((name, handle.value, [getattr(getattr(arg, "_obj", arg), "value", arg) for arg in args]))
            return 0

        return call
