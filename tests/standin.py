"""A card that is none: NumPy's arrays in a memory of their own, and CUDA's source run as C++.

`Array` is as strict as CuPy's: nothing of NumPy's goes in or out but through `up` and `down`, and
every array takes from a pool with a limit. `Emulated.launch` runs the very source that NVRTC would
compile, thread by thread, compiled by the machine's own compiler with a few lines for what CUDA has
built in; it refuses reads outside of the arguments and addresses that are not multiples of what is
read there, as a card does, and looks for writes outside by patterns around every array.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.fast.gpu.kernels import FORMS, THREADS, source

GUARD, ALIGNED, PATTERN = 512, 512, 0xA5


class OutOfMemory(MemoryError):
    pass


class Pool:
    def __init__(self) -> None:
        self.used = self.most = 0
        self.limit: int | None = None

    def take(self, nbytes: int) -> None:
        if self.limit is not None and self.used + nbytes > self.limit:
            raise OutOfMemory(f"{self.used} + {nbytes} bytes of {self.limit}")
        self.used += nbytes
        self.most = max(self.most, self.used)

    def give(self, nbytes: int) -> None:
        self.used -= nbytes


pool = Pool()


class Memory:
    """Aligned bytes between two guards."""

    def __init__(self, nbytes: int):
        size = -(-nbytes // ALIGNED) * ALIGNED
        pool.take(size)
        weakref.finalize(self, pool.give, size)
        raw = np.full(nbytes + 2 * GUARD + ALIGNED, PATTERN, np.uint8)
        start = GUARD + -(raw.ctypes.data + GUARD) % ALIGNED
        self.raw, self.start, self.nbytes = raw, start, nbytes

    @property
    def own(self) -> np.ndarray:
        return self.raw[self.start : self.start + self.nbytes]

    @property
    def sound(self) -> bool:
        before, after = self.raw[: self.start], self.raw[self.start + self.nbytes :]
        return bool((before == PATTERN).all() and (after == PATTERN).all())


class Array:
    __array_ufunc__ = None  # NumPy's operators and functions do not take it
    __hash__ = object.__hash__

    def __init__(self, a: np.ndarray, memory: Memory):
        self._a, self._memory = a, memory

    @classmethod
    def new(cls, shape: Any, dtype: Any) -> "Array":
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        memory = Memory(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return cls(memory.own.view(dtype).reshape(shape), memory)

    def _result(self, a: Any) -> "Array":
        """Itself, a view of the same memory, or a new array."""
        if a is self._a:
            return self
        if isinstance(a, np.ndarray) and np.may_share_memory(a, self._memory.raw):
            return Array(a, self._memory)
        return moved(a)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __len__(self) -> int:
        return len(self._a)

    def __getitem__(self, key: Any) -> "Array":
        return self._result(self._a[inside(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        counts["launches"] += 1
        self._a[inside(key)] = inside(value)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "strides", "flags", "itemsize"):
            return getattr(self._a, name)
        if name == "T":
            return self._result(self._a.T)
        if name in METHODS:
            method = getattr(self._a, name)

            def run(*args: Any, **kwargs: Any) -> Any:
                out = self._result(method(*inside(args), **kwargs))
                counts["launches"] += out._memory is not self._memory
                return out

            return run
        raise AttributeError(name)


METHODS = ("reshape", "transpose", "view", "astype", "mean", "sum", "max", "all", "copy")
counts = {"launches": 0}


def moved(a: Any) -> Array:
    a = np.asarray(a)
    out = Array.new(a.shape, a.dtype)
    out._a[...] = a
    if not a.flags.c_contiguous and a.flags.f_contiguous:  # results keep their order, as in CuPy
        out._a = out._memory.own.view(a.dtype).reshape(a.shape[::-1]).T
        out._a[...] = a
    return out


def inside(x: Any) -> Any:
    if isinstance(x, Array):
        return x._a
    if isinstance(x, tuple | list):
        return type(x)(inside(part) for part in x)
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError("a NumPy array where one of the card is expected")
    return x


def _operator(name: str) -> Any:
    def run(self: Array, *others: Any) -> Any:
        counts["launches"] += 1
        out = getattr(self._a, name)(*inside(others))
        return out if out is NotImplemented else moved(out)

    return run


OPERATORS = [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "matmul",
    "neg",
    "and",
    "rand",
    "or",
    "rshift",
    "lshift",
    "le",
    "ge",
    "lt",
    "gt",
    "eq",
    "ne",
]
for _name in OPERATORS:
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))


def _function(name: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        counts["launches"] += 1
        out = getattr(np, name)(*inside(args), **{k: inside(v) for k, v in kwargs.items()})
        return moved(out)

    return run


def _asarray(a: Any) -> Array:
    return a if isinstance(a, Array) else moved(a)


def _ascontiguous(a: Array, dtype: Any = None) -> Array:
    same = a.flags.c_contiguous and dtype in (None, a.dtype)
    return a if same else moved(np.ascontiguousarray(a._a, dtype))


FUNCTIONS = [
    "exp",
    "abs",
    "sqrt",
    "maximum",
    "where",
    "isfinite",
    "concatenate",
    "stack",
    "repeat",
    "arange",
    "full",
    "zeros",
    "zeros_like",
    "argsort",
    "take_along_axis",
]

xp = types.ModuleType("standin_card")
Array.__module__ = "standin_card"
sys.modules["standin_card"] = xp
xp.ndarray = Array  # type: ignore[attr-defined]
xp.empty = Array.new  # type: ignore[attr-defined]
xp.empty_like = lambda a: Array.new(a.shape, a.dtype)  # type: ignore[attr-defined]
xp.asarray = _asarray  # type: ignore[attr-defined]
xp.ascontiguousarray = _ascontiguous  # type: ignore[attr-defined]
for _name in FUNCTIONS:
    setattr(xp, _name, _function(_name))
NAMES = [*FUNCTIONS, "ndarray", "empty", "empty_like", "asarray", "ascontiguousarray"]


class Emulated:
    """A `Device`. `log` is what it was told, in order."""

    def __init__(self, folder: Path, total: int = 24 * 10**9, processors: int = 1):
        self.xp, self.name, self.total, self.processors = xp, "stand-in", total, processors
        self.folder = folder
        self.log: list[tuple[str, Any]] = []
        self.most_before = pool.used
        pool.most, pool.limit = pool.used, None
        self._pinned: list[np.ndarray] = []

    def free(self) -> int:
        return self.total

    def limit(self, nbytes: int) -> None:
        pool.limit = self.most_before + nbytes

    def peak(self) -> int:
        return pool.most - self.most_before

    def pinned(self, nbytes: int) -> np.ndarray:
        self._pinned.append(np.empty(nbytes, np.uint8))
        return self._pinned[-1]

    def up(self, host: np.ndarray, to: Array) -> None:
        self._from_pinned(host)
        assert host.shape == to.shape
        assert host.dtype == to.dtype
        assert to.flags.c_contiguous
        to._a[...] = host
        host.view(np.uint8)[...] = PATTERN  # a copy that is under way reads it when it likes
        self.log.append(("up", to.nbytes))

    def down(self, a: Array, host: np.ndarray) -> None:
        self._from_pinned(host)
        assert a.flags.c_contiguous
        assert host.shape == a.shape
        host[...] = a._a
        self.log.append(("down", a.nbytes))

    def _from_pinned(self, host: np.ndarray) -> None:
        assert any(np.may_share_memory(host, p) for p in self._pinned)

    def wait(self) -> None:
        self.log.append(("wait", None))

    def launch(
        self, form: str, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...], shared: int
    ) -> None:
        assert 0 < grid[0] < 2**31
        assert 0 < grid[1] <= 65535
        assert 0 < grid[2] <= 65535
        assert shared <= 48 << 10
        self.log.append(("launch", f"{form} {kernel}"))
        library = compiled(form, self.folder)
        arrays = [a for a in args if isinstance(a, Array)]
        ranges = (ctypes.c_size_t * (2 * len(arrays)))()
        for n, a in enumerate(arrays):
            assert a.flags.c_contiguous
            ranges[2 * n] = a._a.ctypes.data
            ranges[2 * n + 1] = a._a.ctypes.data + a.nbytes
        kinds: dict[type, Any] = {np.int32: ctypes.c_int, np.int64: ctypes.c_longlong}
        values = [
            ctypes.c_void_p(a._a.ctypes.data) if isinstance(a, Array) else kinds[type(a)](int(a))
            for a in args
        ]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values)
        )
        signature = getattr(library, f"signature_{kernel}")
        signature.restype = ctypes.c_char_p
        told = "".join("p" if isinstance(a, Array) else {4: "i", 8: "l"}[a.itemsize] for a in args)
        assert signature().decode() == told, f"{kernel}: arguments {told}"
        wrong = library.launch(
            getattr(library, f"run_{kernel}"),
            *grid,
            THREADS,
            pointers,
            shared,
            int(kernel.startswith("rows")),
            ranges,
            len(arrays),
        )
        assert not wrong, f"{kernel}: {wrong} reads outside of its arguments or not aligned"
        assert all(a._memory.sound for a in arrays), f"{kernel}: a write outside of an array"


SHIM = r"""
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static std::vector<char> shared_memory;
static const size_t* ranges;
static int range_count, wrong;
template <class T> static T __ldg(const T* p) {
    const size_t at = (size_t)p;
    bool fine = at % sizeof(T) == 0, within = false;
    for (int n = 0; n < range_count; n++)
        within |= at >= ranges[2 * n] && at + sizeof(T) <= ranges[2 * n + 1];
    if (!fine || !within) { wrong++; return T(); }
    return *p;
}
static float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int n = 0; n < 4; n++)
        out |= (unsigned)(both >> (8 * (s >> (4 * n) & 7)) & 255) << (8 * n);
    return out;
}
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (n & 31));
}
using std::min;
static char done[1024], begun[1024];
static float lanes[1024];
// A fiber begins by setcontext, once; then it is left and entered by these, without a system call.
static jmp_buf back, inside[1024];
static int running, left_over;
static void next();
static void yield() { if (!_setjmp(inside[threadIdx.x])) next(); }
static void __syncthreads() { yield(); }
static float __shfl_xor_sync(unsigned, float x, int n) {
    lanes[threadIdx.x] = x;
    yield();
    const float there = lanes[threadIdx.x ^ n];
    yield();
    return there;
}
typedef void (*Kernel)(void**);
static Kernel kernel;
static void** arguments;
static void fiber() {
    for (;;) {  // blocks, of this launch and later ones
        kernel(arguments);
        done[threadIdx.x] = 1;
        left_over--;
        yield();
    }
}
static void next() {  // of those that are not done, in turn
    if (!left_over) _longjmp(back, 1);
    int t = threadIdx.x;
    do t = t + 1 < running ? t + 1 : 0; while (done[t]);
    threadIdx = {t, 0, 0};
    if (begun[t]) _longjmp(inside[t], 1);
    begun[t] = 1;
    static const size_t stack = 64 << 10;
    static char* const stacks = (char*)malloc(stack * 1024);
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = stacks + stack * t;
    first.uc_stack.ss_size = stack;
    makecontext(&first, fiber, 0);
    setcontext(&first);
}
static void block(int threads) {
    memset(done, 0, sizeof done);
    running = left_over = threads, threadIdx = {threads - 1, 0, 0};
    if (!_setjmp(back)) next();
}
extern "C" int launch(
    Kernel k, int gx, int gy, int gz, int threads, void** args, int shared, int together,
    const size_t* allowed, int count
) {
    kernel = k, arguments = args, ranges = allowed, range_count = count, wrong = 0;
    gridDim = {gx, gy, gz}, blockDim = {threads, 1, 1};
    shared_memory.assign(shared + 16, 0);
    for (int z = 0; z < gz; z++) for (int y = 0; y < gy; y++) for (int x = 0; x < gx; x++) {
        blockIdx = {x, y, z};
        if (!together) {
            for (int t = 0; t < threads; t++) threadIdx = {t, 0, 0}, k(args);
            continue;
        }
        block(threads);
    }
    return wrong;
}
"""

_libraries: dict[str, Any] = {}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def compiled(form: str, folder: Path) -> Any:
    code = source(FORMS[form])
    code = code.replace(
        "extern __shared__ float4 stage[];",
        "float4* stage = (float4*)(((size_t)shared_memory.data() + 15) & ~(size_t)15);",
    )
    text = SHIM + code
    for name, listed in re.findall(r'extern "C" __global__ void .*? (\w+)\(([^)]*)\) \{', code):
        kinds = [part.strip().rpartition(" ")[0] for part in listed.split(",")]
        calls = ", ".join(f"*({kind}*)a[{n}]" for n, kind in enumerate(kinds))
        letters = "".join("p" if "*" in k else "l" if k == "i64" else "i" for k in kinds)
        text += f'extern "C" void run_{name}(void** a) {{ {name}({calls}); }}\n'
        text += f'extern "C" const char* signature_{name}() {{ return "{letters}"; }}\n'
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if key not in _libraries:
        file = folder / f"{form}-{key}.cpp"
        file.write_text(text)
        built = file.with_suffix(".so")
        command = [
            str(compiler()),
            "-std=c++17",
            "-O2",
            "-ffp-contract=off",
            "-w",
            "-shared",
            "-U_FORTIFY_SOURCE",
        ]
        subprocess.run([*command, "-fPIC", str(file), "-o", str(built)], check=True)
        _libraries[key] = ctypes.CDLL(str(built))
    return _libraries[key]
