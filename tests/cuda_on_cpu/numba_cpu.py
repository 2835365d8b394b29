"""Numba-CUDA kernels on NumPy arrays, without a GPU: numba-cuda's own LLVM code, compiled for this processor by llvmlite.

    on_cpu = NumbaOnCpu(order="shuffled")
    on_cpu(kernel)[blocks, threads, 0, shared_bytes](x, y, np.int32(n))

CUDA threads are the fibers of `include/block.h`, and `numba_runtime.cpp` has what the code calls on a device. Kernels are lazy `@cuda.jit`
functions. It uses functions of numba-cuda that are not public, so the test extra pins the version.
"""

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from cuda_on_cpu.cpu_cuda import ORDERS, Guarded, build

RUNTIME = Path(__file__).parent / "numba_runtime.cpp"
COMPUTE_CAPABILITY = (9, 0)
SIZES = {"float": 4, "double": 8, "i32": 4, "i64": 8, "i16": 2, "i8": 1, "half": 2}
CODES = {"float32": "f", "float64": "d", "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q", "bool": "b", "boolean": "b"}

LIBRARY_CALLS = ("memset", "memcpy", "memmove")  # what LLVM makes of loops; the linker finds them

# LLVM's intrinsics return a pair: our functions return its number, and its bit, if it is needed, through a pointer
PAIRS = """
declare i32 @warp_shuffle(i32, i32, i32, i32, i32, ptr) convergent noduplicate
declare i32 @warp_vote(i32, i32, i32) convergent noduplicate
define internal {i32, i1} @"nvvm.shfl.sync.i32"(i32 %mask, i32 %mode, i32 %value, i32 %offset, i32 %clamp) {
  %place = alloca i8
  %result = call i32 @warp_shuffle(i32 %mask, i32 %mode, i32 %value, i32 %offset, i32 %clamp, ptr %place)
  %byte = load i8, ptr %place
  %inside = trunc i8 %byte to i1
  %half = insertvalue {i32, i1} undef, i32 %result, 0
  %pair = insertvalue {i32, i1} %half, i1 %inside, 1
  ret {i32, i1} %pair
}
define internal {i32, i1} @"nvvm.vote.sync"(i32 %mask, i32 %mode, i1 %predicate) {
  %wide = zext i1 %predicate to i32
  %result = call i32 @warp_vote(i32 %mask, i32 %mode, i32 %wide)
  %any = icmp ne i32 %result, 0
  %half = insertvalue {i32, i1} undef, i32 %result, 0
  %pair = insertvalue {i32, i1} %half, i1 %any, 1
  ret {i32, i1} %pair
}
"""


class NumbaOnCpu:
    """Runs kernels with their threads and blocks in one of ORDERS."""

    def __init__(self, order: str = "forward") -> None:
        self.order = ORDERS.index(order)

    def __call__(self, kernel: Any) -> "Configured":
        return Configured(kernel, self.order)


class Configured:
    """A kernel that takes its launch shape in brackets, as in numba-cuda: [blocks, threads, stream, shared bytes]."""

    def __init__(self, kernel: Any, order: int) -> None:
        self.kernel, self.order = kernel, order

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        grid, block = ((*np.atleast_1d(size).tolist(), 1, 1)[:3] for size in shape[:2])
        shared = int(shape[3]) if len(shape) > 3 else 0
        return lambda *args: self._run(grid, block, shared, args)

    def _run(self, grid: Any, block: Any, shared: int, args: tuple[Any, ...]) -> None:
        from numba.cuda.typing.typeof import typeof

        kinds = tuple(typeof(argument) for argument in args)
        code = compiled(self.kernel.py_func, kinds, bool(self.kernel.targetoptions.get("fastmath")))
        guarded = [Guarded(argument) if isinstance(argument, np.ndarray) else None for argument in args]
        words: list[np.ndarray[Any, Any]] = []
        for argument, guard, kind in zip(args, guarded, kinds, strict=True):
            if guard is None:
                words.append(np.array(argument, dtype=CODES[str(kind)]))
            else:
                address = int(guard.address())
                flat = (0, 0, argument.size, argument.itemsize, address, *argument.shape, *argument.strides)
                words += [np.array(word, dtype=np.int64) for word in flat]
        assert len(words) == code.parameters, f"{len(words)} words for {code.parameters} parameters"
        pointers = (ctypes.c_void_p * len(words))(*(word.ctypes.data for word in words))
        code.dynamic_bytes.value = shared
        message, three = ctypes.create_string_buffer(256), ctypes.c_uint * 3
        failed = library().launch_compiled(
            ctypes.c_void_p(code.entry), three(*grid), three(*block), ctypes.c_size_t(shared), pointers, self.order, message,
            ctypes.c_size_t(len(message)), code.shared, code.shared_bytes, len(code.shared),
        )  # fmt: skip
        name = self.kernel.py_func.__name__
        if failed:
            raise RuntimeError(f"{name}: {message.value.decode()}")
        for i, guard in enumerate(guarded):
            if guard is not None:
                guard.copy_back(f"{name}: argument {i}")


@cache
def library() -> ctypes.CDLL:
    """The runtime, built and loaded where LLVM looks up names."""
    from numba.cuda import dispatcher

    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=COMPUTE_CAPABILITY)  # device functions ask for one
    path = build(RUNTIME, [])
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.load_library_permanently(str(path))
    found = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    found.address_of_dynamic_shared.restype = ctypes.c_void_p
    return found


class Code:
    """A kernel's machine code for some argument types."""

    def __init__(self, texts: list[str]) -> None:
        runtime = library()
        parsed = [llvm.parse_assembly(text) for text in texts]
        module = parsed[0]
        module.triple = llvm.get_process_triple()
        for other in parsed[1:]:
            other.triple = module.triple
            module.link_in(other)
        module.verify()
        whole = "\n".join(texts)
        for name in re.findall(r'^@"(_cudapy_smem_\d+)" = external', whole, re.M):
            llvm.add_symbol(name, runtime.address_of_dynamic_shared())
        target = llvm.Target.from_default_triple().create_target_machine(
            opt=2, codemodel="large", cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), jit=True
        )
        passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        missing = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.") and not known(f.name)]
        if missing:
            raise NotImplementedError(f"numba_runtime.cpp lacks {', '.join(missing)}")
        self.engine = llvm.create_mcjit_compiler(module, target)
        self.engine.finalize_object()
        self.entry = self.engine.get_function_address("entry_of_kernel")
        self.dynamic_bytes = ctypes.c_int.from_address(self.engine.get_global_value_address("dynamic_bytes"))
        self.parameters = len(re.findall(r"%word\d+ = load", texts[0]))
        static = re.findall(r'^@"(_cudapy_smem_\d+)" = addrspace\(3\) global \[(\d+) x (\w+)\]', whole, re.M)
        spans = [(self.engine.get_global_value_address(name), int(count) * SIZES[kind]) for name, count, kind in static]
        self.shared = (ctypes.c_void_p * len(spans))(*(address for address, _ in spans))
        self.shared_bytes = (ctypes.c_size_t * len(spans))(*(size for _, size in spans))


def known(name: str) -> bool:
    """True if this process has a function of that name: an unknown one would be called at address 0."""
    return name in LIBRARY_CALLS or llvm.address_of_symbol(name) is not None


@cache
def lowered(function: Any, kinds: tuple[Any, ...], fastmath: bool = False) -> Any:
    """numba-cuda's library of a kernel for some argument types: LLVM code, before it is compiled any further."""
    from numba.cuda import types
    from numba.cuda.compiler import _compile_pyfunc_with_fixup

    library()
    made, _ = _compile_pyfunc_with_fixup(
        function, types.void(*kinds), debug=None, lineinfo=False, device=False, fastmath=fastmath, cc=COMPUTE_CAPABILITY, opt=None,
        abi="numba", abi_info=None, forceinline=False, launch_bounds=None, lto=False,
    )  # fmt: skip
    return made


@cache
def compiled(function: Any, kinds: tuple[Any, ...], fastmath: bool) -> Code:
    """numba-cuda's LLVM code of a kernel, made into the processor's."""
    return Code([for_processor(text, first=i == 0) for i, text in enumerate(lowered(function, kinds, fastmath).llvm_strs)])


def for_processor(text: str, first: bool) -> str:
    """LLVM code for a device as code for this processor; the kernel's own module also gets an entry with one pointer per parameter."""
    for line in (r"target .*", r'@"llvm.used".*', r"!nvvm.*", r'declare .*@"llvm\.nvvm\.(shfl\.sync\.i32|vote\.sync)".*'):
        text = re.sub(rf"^{line}\n", "", text, flags=re.M)
    text = text.replace('@"llvm.nvvm.', '@"nvvm.').replace("common global", "weak global")
    # a barrier must stay one instruction: LLVM would copy it into both arms of a branch
    text = re.sub(r'^(declare [^\n]*@"nvvm\.(?:barrier0|bar\.|match)[^\n]*\))', r"\1 convergent noduplicate", text, flags=re.M)
    text = re.sub(r'call i32 asm sideeffect "mov.u32 \$0, %dynamic_smem_size;", "=r"\(\)', "load i32, ptr @dynamic_bytes", text)
    if " asm " in text:
        line = re.search(r".* asm .*", text)
        raise NotImplementedError(f"inline PTX: {line.group(0).strip() if line else ''}")
    if not first:
        return "@dynamic_bytes = external global i32\n" + text + PAIRS
    found = re.search(r'^define void (@"[^"]+")\((.*?)\)', text, re.M)
    assert found is not None
    name, parameters = found.groups()
    kinds = [parameter.split()[0] for parameter in parameters.split(",")] if parameters else []
    loads = [
        f"  %slot{i} = getelementptr ptr, ptr %words, i64 {i}\n  %at{i} = load ptr, ptr %slot{i}\n  %word{i} = load {kind}, ptr %at{i}\n"
        for i, kind in enumerate(kinds)
    ]
    call = f"  call void {name}({', '.join(f'{kind} %word{i}' for i, kind in enumerate(kinds))})\n  ret void\n"
    entry = "define void @entry_of_kernel(ptr %words) {\n" + "".join(loads) + call + "}\n"
    return "@dynamic_bytes = global i32 0\n" + text + PAIRS + entry
