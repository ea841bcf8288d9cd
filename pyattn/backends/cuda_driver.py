"""NVIDIA's driver by ctypes: machine code into a GPU's memory, and launches of it.

Torch's allocator and streams are the runtime's, which stands on the same driver: a device's primary context is the one
torch uses, and a stream's handle is the same number in both.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

from pyattn.backends import KernelError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
ENTRY = b"pyattn_kernel"  # what the kernel of every module is called

# Numbers out of cuda.h.
_INVALID_CONTEXT = 201
# Invalid value (of shared memory), invalid image, no binary for this GPU, launch out of resources.
_REFUSALS = (1, 200, 209, 701)
_CAPTURE_ERRORS = range(900, 910)
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # a function's attribute
_CAPTURE_MODE_RELAXED = 2
_SHARED_BYTES_FOR_ALL = 48 * 1024  # more of a block's shared memory has to be asked for

_INTEGERS_OUT = POINTER(c_int)
_POINTERS_OUT = POINTER(c_void_p)
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [_INTEGERS_OUT],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [_INTEGERS_OUT, c_int],
    "cuDevicePrimaryCtxRetain": [_POINTERS_OUT, c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [_POINTERS_OUT],
    "cuCtxSetCurrent": [c_void_p],
    "cuThreadExchangeStreamCaptureMode": [_INTEGERS_OUT],
    "cuModuleLoadData": [_POINTERS_OUT, c_char_p],
    "cuModuleGetFunction": [_POINTERS_OUT, c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    # function; grid x, y, z; block x, y, z; bytes of shared memory; stream; array of pointers to arguments; nothing
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_char_p), c_void_p],
}


class DriverError(RuntimeError):
    """A call of the driver failed, mostly because of what the device did before: a fault of an earlier kernel, say."""

    def __init__(self, number: int, said: str) -> None:
        super().__init__(f"CUDA error {number}: {said}")
        self.number = number


class CaptureError(RuntimeError):
    """A kernel was first needed while a CUDA graph is captured. No KernelError: outside of captures it will do."""

    def __init__(self) -> None:
        super().__init__(
            "a CUDA graph is being captured, and a kernel of this call is not loaded yet: make the same call once "
            "before the capture begins (a warm-up, as torch.cuda.graph asks for)"
        )


class Driver:
    """The driver of a machine. Its methods may be called from any thread, and leave that thread's context as it was."""

    def __init__(self, path: str = LIBRARY) -> None:
        """
        Raises:
            OSError: there is none.
        """
        self.library = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            getattr(self.library, name).argtypes = arguments
        self._contexts: dict[int, c_void_p] = {}

    @property
    def version(self) -> tuple[int, int]:
        """The newest CUDA it can run."""
        number = c_int()
        self.check(self.library.cuDriverGetVersion(byref(number)))
        return number.value // 1000, number.value % 1000 // 10

    def check(self, status: int) -> None:
        """
        Raises:
            KernelError: the status says that the device does not take this machine code, or so much shared memory.
            DriverError: it says anything else but 0.
        """
        if status != 0:
            said = c_char_p()
            self.library.cuGetErrorString(status, byref(said))
            error = DriverError(status, (said.value or b"unknown to this driver").decode())
            raise KernelError(f"its kernel cannot run on this device: {error}") if status in _REFUSALS else error

    def load(self, device: int, code: bytes, shared_bytes: int) -> Kernel:
        """A cubin's kernel, ready to be launched on the device with so much dynamic shared memory.

        Raises:
            KernelError, DriverError
            CaptureError: it cannot be loaded before a capture has ended.
        """
        module, function = c_void_p(), c_void_p()
        try:
            with self._current(device), self._during_captures():
                self.check(self.library.cuModuleLoadData(byref(module), code))
                self.check(self.library.cuModuleGetFunction(byref(function), module, ENTRY))
                if shared_bytes > _SHARED_BYTES_FOR_ALL:
                    attribute = _MAX_DYNAMIC_SHARED_SIZE_BYTES
                    self.check(self.library.cuFuncSetAttribute(function, attribute, shared_bytes))
        except DriverError as error:
            if error.number in _CAPTURE_ERRORS:
                raise CaptureError from error
            raise
        return Kernel(self, device, function, shared_bytes)

    def enter(self, device: int) -> None:
        """Makes the device's context this thread's."""
        self.check(self.library.cuCtxSetCurrent(self._context(device)))

    def _context(self, device: int) -> c_void_p:
        if (context := self._contexts.get(device)) is None:
            handle, context = c_int(), c_void_p()
            self.check(self.library.cuInit(0))
            self.check(self.library.cuDeviceGet(byref(handle), device))
            self.check(self.library.cuDevicePrimaryCtxRetain(byref(context), handle))
            self._contexts[device] = context
        return context

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """The device's context for the time of the block."""
        self.check(self.library.cuCtxPushCurrent_v2(self._context(device)))
        try:
            yield
        finally:
            self.library.cuCtxPopCurrent_v2(byref(c_void_p()))

    @contextmanager
    def _during_captures(self) -> Iterator[None]:
        """Allows this thread what would else break a capture, its own or another thread's. Loading harms none."""
        mode = c_int(_CAPTURE_MODE_RELAXED)
        self.check(
            self.library.cuThreadExchangeStreamCaptureMode(byref(mode))
        )  # which stores the mode before in `mode`
        try:
            yield
        finally:
            self.library.cuThreadExchangeStreamCaptureMode(byref(mode))


class Kernel:
    """One compiled kernel in the memory of one device, for the rest of the process."""

    def __init__(self, driver: Driver, device: int, function: c_void_p, shared_bytes: int) -> None:
        self._driver, self._device, self._function, self._shared_bytes = driver, device, function, shared_bytes
        self._launch = driver.library.cuLaunchKernel

    def launch(self, grid_x: int, threads: int, arguments: bytes, stream: int) -> None:
        """Starts so many blocks on the stream of the kernel's device, which is current unless the thread is new.

        arguments: the bytes of the struct that is the kernel's one parameter.

        Raises:
            KernelError, DriverError
        """
        # An array of one pointer: the driver copies as many bytes from there as the kernel's parameter has.
        pointer = c_char_p(arguments)
        given = self._function, grid_x, 1, 1, threads, 1, 1, self._shared_bytes, stream, byref(pointer), None
        status = self._launch(*given)
        if status == _INVALID_CONTEXT:
            # A thread that torch has asked for nothing yet but memory it had at hand has no context: autograd's, say.
            self._driver.enter(self._device)
            status = self._launch(*given)
        if status != 0:
            self._driver.check(status)
