"""Open a CUDA device through CuPy, or say what to install."""

import ctypes
import importlib
from typing import Any, Protocol

import numpy as np

from refmoe.fast.gpu.kernels import FORMS, THREADS, source
from refmoe.files import InputError

MODULE = 16 * 512  # bytes at most that a module's arrays lose by being rounded to STEP

INSTALL = (
    "pip install 'refmoe[gpu]' for CUDA 12 or 'refmoe[gpu13]' for CUDA 13, with NVIDIA's driver"
)

Array = Any  # on the card: CuPy has no stubs


class Device(Protocol):
    """A GPU as this room uses it. Copies and launches are queued in order and do not wait."""

    xp: Any  # the array module
    name: str
    total: int  # bytes
    processors: int

    def free(self) -> int: ...

    def limit(self, nbytes: int) -> None:
        """Let all arrays together take no more than this."""

    def peak(self) -> int:
        """Return the most bytes that arrays ever took."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Return bytes of the processor's memory that the GPU reads and writes by itself."""
        ...

    def up(self, host: np.ndarray, to: Array) -> None: ...

    def down(self, a: Array, host: np.ndarray) -> None: ...

    def wait(self) -> None: ...

    def launch(
        self, form: str, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...], shared: int
    ) -> None: ...


class CudaDevice:
    """The first CUDA device, through CuPy; `InputError` where there is none."""

    def __init__(self) -> None:
        try:
            cupy = importlib.import_module("cupy")
        except ImportError as e:
            reason = str(e).strip().partition("\n")[0]
            raise InputError(f"--gpu needs CuPy ({reason}): {INSTALL}") from None
        try:
            if not cupy.cuda.runtime.getDeviceCount():
                raise RuntimeError("none is there")
            device = cupy.cuda.Device(0)
            device.use()
            _, self.total = device.mem_info
            facts = cupy.cuda.runtime.getDeviceProperties(0)
        except Exception as e:  # of CuPy's own kinds, by the state of driver and library
            text = f"--gpu finds no CUDA device that CuPy {cupy.__version__} can use ({e})"
            raise InputError(f"{text}: {INSTALL}") from None
        self.xp = cupy
        self.name = facts["name"].decode()
        self.processors = int(facts["multiProcessorCount"])
        self.pool = cupy.get_default_memory_pool()
        self.pool.free_all_blocks()  # of a model that was dropped
        self.most = 0
        self.modules: dict[str, Any] = {}
        self.kernels: dict[tuple[str, str], Any] = {}

    def free(self) -> int:
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def limit(self, nbytes: int) -> None:
        self.pool.set_limit(size=nbytes)

    def peak(self) -> int:
        """Return what the pool took of the device: it gives back only near the limit."""
        self.most = max(self.most, self.pool.total_bytes())
        return self.most

    def pinned(self, nbytes: int) -> np.ndarray:
        memory = self.xp.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def up(self, host: np.ndarray, to: Array) -> None:
        to.data.copy_from_host_async(ctypes.c_void_p(host.ctypes.data), host.nbytes, self._stream)

    def down(self, a: Array, host: np.ndarray) -> None:
        a.data.copy_to_host_async(ctypes.c_void_p(host.ctypes.data), host.nbytes, self._stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def launch(
        self, form: str, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...], shared: int
    ) -> None:
        if form not in self.modules:  # CuPy keeps what it compiled for the next time
            code = source(FORMS[form])
            self.modules[form] = self.xp.RawModule(code=code, options=("--std=c++17",))
        run = self.kernels.get((form, kernel))
        if run is None:
            run = self.kernels[form, kernel] = self.modules[form].get_function(kernel)
        run(grid, (THREADS, 1, 1), args, shared_mem=shared)

    @property
    def _stream(self) -> Any:
        return self.xp.cuda.get_current_stream()


def open_device() -> Device:
    """Return the GPU; `InputError` says what is missing. Tests put a stand-in here."""
    return CudaDevice()


def first_array(there: Any) -> Any:
    """Return the first array of a matrix or of several: it tells in which memory they are."""
    while isinstance(there, tuple):
        there = next((part for part in there if part is not None), None)
    return there
