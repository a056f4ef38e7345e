"""A device that is not there: real arithmetic on the CPU, with the rules of another device.

Which device a tensor is on is remembered by its storage, so that views, parameters whose ``data``
is replaced and what autograd saves are where they should be without further ado. A dispatch mode
sees every operation below autograd: it refuses what mixes devices as torch does, and puts results
where their arguments are. What Python code says of devices (``tensor.device``, ``.to``,
``torch.zeros(..., device=...)``) is replaced while the device is there.

Rules taken from torch on CUDA:

- operations want all tensors on one device; CPU tensors without dimension may join;
- ``copy_`` goes between devices; indices may be on the CPU, but a CPU tensor takes no others;
- there is no ``numpy()`` of device memory, and no matrix product of integers;
- dividing by a number of Python multiplies by its reciprocal (``exact=False``).

Not simulated: what CUDA lacks otherwise, its kernels' rounding, asynchronous errors, speed.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CPU = torch.device("cpu")
_MARK = "simulated_device"
_FLOATING = "floating"
"""Mark of what torch itself made inside an operation, from a shape alone: it goes with anything."""
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._copy_from.default}
_INDEXED = {
    _aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default,
    _aten._index_put_impl_.default, _aten._unsafe_index.Tensor,
}  # fmt: skip
_MATRIX_PRODUCTS = {
    _aten.mm.default, _aten.mm.out, _aten.bmm.default, _aten.bmm.out, _aten.addmm.default,
    _aten.addmm.out, _aten.addmm_.default, _aten.baddbmm.default, _aten.mv.default,
    _aten.addmv.default, _aten.dot.default,
}  # fmt: skip
_DIVISIONS = {_aten.div.Tensor: _aten.mul.Tensor, _aten.div_.Tensor: _aten.mul_.Tensor}
_QUESTIONS = {_aten.is_same_size.default, _aten._local_scalar_dense.default}


class SimulatedDevice(TorchDispatchMode):
    """Makes the device exist within a ``with`` statement.

    Attributes:
        device: Its name, ``cuda:0``.
        capacity: Bytes that it holds; more raise ``torch.OutOfMemoryError``.
        used: Bytes of tensors that are on it now.
        peak: The most that were on it at once.
        operations: Number of operations that it ran.
    """

    def __init__(self, capacity: int = 1 << 40, *, exact: bool = True) -> None:
        """Describe it.

        Args:
            capacity: Bytes that it holds.
            exact: Whether dividing by a number of Python rounds as on the CPU.
        """
        super().__init__()
        self.device = torch.device("cuda:0")
        self.capacity = capacity
        self.used = self.peak = self.operations = 0
        self._exact = exact
        self._explicit: list[torch.device] = []
        self._replaced: list[tuple[object, str, object]] = []
        self._alive: dict[int, weakref.ref] = {}

    def __enter__(self):
        self._original_to = torch.Tensor.to
        self._replace_properties()
        self._replace_methods()
        for maker in _device_constructors():
            for place in (torch, torch.fft):
                if getattr(place, maker.__name__, None) is maker:
                    self._put(place, maker.__name__, self._maker(maker))
        for name in ("from_numpy", "frombuffer", "from_file"):
            self._put(torch, name, self._maker(getattr(torch, name)))
        for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like"):
            self._put(torch, name, self._maker(getattr(torch, name), like=True))
        for name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
            self._put(torch.Tensor, name, self._maker(getattr(torch.Tensor, name), like=True))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for place, name, original in reversed(self._replaced):
            if original is None:
                delattr(place, name)
            else:
                setattr(place, name, original)
        self._replaced.clear()

    def on(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the simulated device."""
        return getattr(tensor.untyped_storage(), _MARK, None) == str(self.device)

    def _put(self, place, name, value):
        self._replaced.append((place, name, vars(place).get(name)))
        setattr(place, name, value)

    def _mark(self, tensor: torch.Tensor, mark: str | None) -> None:
        storage = tensor.untyped_storage()
        before = getattr(storage, _MARK, None)
        if before == mark:
            return
        setattr(storage, _MARK, mark)
        if mark == str(self.device):
            self._count(storage)
        elif before == str(self.device):
            self._forget(id(storage), storage.nbytes())

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)
        if self.used + size > self.capacity:
            raise torch.OutOfMemoryError(f"simulated device: {self.used} + {size} bytes")
        self.used += size
        self.peak = max(self.peak, self.used)
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.used -= size

    def _place(self, tensor: torch.Tensor, device: torch.device) -> None:
        self._mark(tensor, str(self.device) if device.type == self.device.type else None)

    def _device_of(self, tensor: torch.Tensor) -> torch.device:
        if tensor.is_meta:
            return torch.device("meta")
        return self.device if self.on(tensor) else CPU

    def _replace_properties(self) -> None:
        self._put(torch.Tensor, "device", property(self._device_of))
        self._put(torch.Tensor, "is_cuda", property(self.on))
        self._put(torch.Tensor, "is_cpu", property(lambda t: self._device_of(t) == CPU))
        self._put(torch.Tensor, "get_device", lambda t: 0 if self.on(t) else -1)

    def _replace_methods(self) -> None:
        simulation, to, numpy = self, torch.Tensor.to, torch.Tensor.numpy
        array, address = torch.Tensor.__array__, torch.Tensor.data_ptr

        def moved(tensor, *args, **options):
            other = options.pop("other", args[0] if args else None)
            copy = options.pop("copy", False)
            if isinstance(other, torch.Tensor):
                device, dtype = simulation._device_of(other), other.dtype
            else:
                device, dtype, _, _ = torch._C._nn._parse_to(*args, **options)
            here = simulation._device_of(tensor)
            dtype = dtype or tensor.dtype
            if device is None or device.type in ("meta", here.type):
                if device is not None and device.type == "meta":
                    return to(tensor, device, dtype)
                return to(tensor, dtype=dtype, copy=copy)
            result = to(tensor, dtype=dtype, copy=True)
            simulation._place(result, device)
            return result

        def refused(tensor):
            raise TypeError(
                f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() to "
                "copy the tensor to host memory first."
            )

        def as_numpy(tensor, *args, **options):
            return refused(tensor) if simulation.on(tensor) else numpy(tensor, *args, **options)

        def as_array(tensor, *args, **options):
            return refused(tensor) if simulation.on(tensor) else array(tensor, *args, **options)

        self._put(torch.Tensor, "to", moved)
        self._put(torch.Tensor, "cpu", lambda tensor: moved(tensor, CPU))
        self._put(torch.Tensor, "cuda", lambda tensor, *_: moved(tensor, simulation.device))
        self._put(torch.Tensor, "numpy", as_numpy)
        self._put(torch.Tensor, "__array__", as_array)
        far = 1 << 62
        self._put(torch.Tensor, "data_ptr", lambda t: address(t) + (far if simulation.on(t) else 0))

    def _maker(self, original, *, like: bool = False):
        """Return a function that makes tensors where its ``device`` says."""

        @functools.wraps(original)
        def make(*args, device=None, **options):
            given = args[0] if args and isinstance(args[0], torch.Tensor) else None
            if device is None and (given is None or options.get("out") is not None):
                wanted = CPU
            elif device is None:
                wanted = self._device_of(given)
            else:
                wanted = torch.device(device)
            if original.__name__ in ("as_tensor", "asarray") and given is not None:
                return given.to(wanted, options.get("dtype") or given.dtype)
            if wanted.type == "meta":
                return original(*args, device=device, **options)
            if device is not None or given is not None:
                options["device"] = CPU  # where it really is
            self._explicit.append(wanted)
            try:
                result = original(*args, **options)
            finally:
                self._explicit.pop()
            made = options.get("out") is None and isinstance(result, torch.Tensor)
            if made and (like or self.on(result) or wanted != CPU):
                self._place(result, wanted)
            return result

        return make

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        tensors = [t for t in tensors if not t.is_meta]
        mine = [t for t in tensors if self.on(t)]
        if not tensors:
            result = func(*args, **kwargs)
            for made in _tensors(result):
                if self._explicit:
                    self._place(made, self._explicit[-1])
                elif not made.is_meta:
                    self._mark(made, _FLOATING)
            return result
        if not mine:
            return self._settled(func(*args, **kwargs), tensors)
        self.operations += 1
        if func in _COPIES or func in _QUESTIONS:
            return func(*args, **kwargs)
        self._check(func, args, tensors)
        if func in _MATRIX_PRODUCTS and not mine[0].is_floating_point():
            raise RuntimeError(f'"{func}" not implemented for {mine[0].dtype} on {self.device}')
        if func in _DIVISIONS and not self._exact:
            func, args = _by_reciprocal(func, args)
        result = func(*args, **kwargs)
        for made in _tensors(result):
            self._place(made, self.device)
        return result

    def _check(self, func, args, tensors) -> None:
        """Refuse an operation of tensors on two devices."""
        if func in _INDEXED:
            if not self.on(args[0]):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu)"
                )
            values = [args[2]] if len(args) > 2 and isinstance(args[2], torch.Tensor) else []
            tensors = [args[0], *values]
        for tensor in tensors:
            if getattr(tensor.untyped_storage(), _MARK, None) == _FLOATING:
                self._place(tensor, self.device)
            elif not self.on(tensor) and (tensor.dim() or _is_written(func, tensor, args)):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {self.device} and cpu! (when calling {func})"
                )

    def _settled(self, result, tensors):
        """Return a result whose arguments are on no known device, or on the CPU."""
        floating = [getattr(t.untyped_storage(), _MARK, None) == _FLOATING for t in tensors]
        for made in _tensors(result):
            if all(floating) and not made.is_meta:
                self._mark(made, _FLOATING)
        return result


def _tensors(result):
    return [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]


def _is_written(func, tensor, args) -> bool:
    """Whether an operation in place changes a tensor."""
    return func._schema.is_mutable and bool(args) and args[0] is tensor


def _by_reciprocal(func, args):
    """Return a division by a number of Python as the product that CUDA computes."""
    values, divisor = args
    number = not isinstance(divisor, torch.Tensor) or (divisor.dim() == 0 and divisor.is_cpu)
    if not number or not values.is_floating_point():
        return func, args
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    return _DIVISIONS[func], (values, torch.tensor(float(divisor), dtype=kind).reciprocal())
