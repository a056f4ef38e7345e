"""Microbenchmarks: what this device really moves and multiplies, beside the table's figures."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from advisor.errors import BackendError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from advisor.hardware.profile import HardwareProfile

Quantity = Literal["bandwidth_gb_s", "fp32_tflops", "bf16_tflops", "int8_tops", "fp8_tflops"]
QUANTITIES: tuple[Quantity, ...] = (
    "bandwidth_gb_s", "fp32_tflops", "bf16_tflops", "int8_tops", "fp8_tflops",
)  # fmt: skip

_REPEATS = 7
_LARGEST_MATRIX = {"cpu": 4096, "cuda": 16384}
_ENOUGH_SECONDS = {"cpu": 0.1, "cuda": 0.005}
"""A product this long is timed; a shorter one is grown first."""
_BUFFER_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured quantity.

    Attributes:
        quantity: Name of the figure in the hardware profile.
        value: Median, in the unit of the name; None if it cannot be measured here.
        low: Slowest repeat.
        high: Fastest repeat.
        table: The profile's figure, if known.
        detail: What was run, as ``4096 x 4096 x 4096``.
        reason: Why there is no value.
    """

    quantity: Quantity
    value: float | None
    low: float | None
    high: float | None
    table: float | None
    detail: str
    reason: str | None = None

    @property
    def share_of_table(self) -> float | None:
        """Measured over the table's figure."""
        return None if self.value is None or not self.table else self.value / self.table


@dataclass(frozen=True, slots=True)
class Measurements:
    """What :func:`measure` found on one device.

    Attributes:
        device: As torch names it: ``cpu``, ``cuda:0``.
        name: The device's name.
        threads: CPU threads used; None on a GPU.
        measured: One entry for each of :data:`QUANTITIES`.
        torch_version: The torch that ran them.
    """

    device: str
    name: str
    threads: int | None
    measured: tuple[Measured, ...]
    torch_version: str

    def value(self, quantity: Quantity) -> float | None:
        """Return a quantity's median, or None if it could not be measured."""
        return next((item.value for item in self.measured if item.quantity == quantity), None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "device": self.device,
            "name": self.name,
            "threads": self.threads,
            "torch_version": self.torch_version,
            "measured": [
                asdict(item) | {"share_of_table": item.share_of_table} for item in self.measured
            ],
        }


def measure(
    device: str = "auto",
    profile: HardwareProfile | None = None,
    *,
    repeats: int = _REPEATS,
    scale: float = 1.0,
    progress: Callable[[str], None] | None = None,
) -> Measurements:
    """Time memory bandwidth and FP32, BF16, INT8 and FP8 matrix products on a device.

    Bandwidth is a copy of a large buffer, read and write counted. Products are of square
    matrices, grown until one takes long enough to time. Every figure is the median of the repeats,
    after one that warms up. About ten seconds on two cores, two on a GPU.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: the first GPU if torch can use one.
        profile: Its figures are put beside the measured ones.
        repeats: Timed runs of each quantity.
        scale: Factor of buffer size, matrix size and shortest time; below 1 in tests.
        progress: Called with the name of each quantity before it is measured.

    Raises:
        InputError: ``repeats`` or ``scale`` is out of range, or there is no such device.
        BackendError: torch is missing.
    """
    if repeats < 1 or not 0 < scale <= 1:
        raise InputError(
            f"repeats must be at least 1 and scale in (0, 1], but got repeats={repeats} and "
            f"scale={scale}."
        )
    try:
        import torch
    except ImportError as error:
        raise BackendError(
            f"Measuring needs torch, which does not import here: {error}. "
            "Run `pip install torch`, or leave out --measure."
        ) from error
    chosen = _choose_device(torch, device)
    bench = _Bench(torch, chosen, repeats, scale)
    measured = []
    for quantity in QUANTITIES:
        if progress is not None:
            progress(quantity)
        table = None if profile is None else profile.figure(quantity)
        measured.append(bench.run(quantity, table))
    is_gpu = chosen.type == "cuda"
    fallback = "CPU" if profile is None else profile.name
    return Measurements(
        device=str(chosen),
        name=torch.cuda.get_device_name(chosen) if is_gpu else fallback,
        threads=None if is_gpu else torch.get_num_threads(),
        measured=tuple(measured),
        torch_version=str(torch.__version__),
    )


def _choose_device(torch_module: Any, device: str) -> torch.device:
    usable = torch_module.cuda.is_available()
    if device == "auto":
        device = "cuda:0" if usable else "cpu"
    try:
        chosen = torch_module.device(device)
    except RuntimeError as error:
        raise InputError(f"The device must be cpu or cuda:N, but got {device!r}.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"The device must be cpu or cuda:N, but got {device!r}.")
    count = torch_module.cuda.device_count() if usable else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise InputError(
            f"The device must be one that torch can use, but got {device!r} and torch sees "
            f"{count} CUDA devices. Use --device cpu, or install a torch with CUDA."
        )
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch_module.device("cuda", torch_module.cuda.current_device())
    return chosen  # type: ignore[no-any-return]


class _Bench:
    """Timing on one device."""

    def __init__(self, torch_module: Any, device: torch.device, repeats: int, scale: float) -> None:
        self.torch = torch_module
        self.device = device
        self.repeats = repeats
        self.scale = scale
        self.largest = max(64, int(_LARGEST_MATRIX[device.type] * scale))
        self.enough = _ENOUGH_SECONDS[device.type] * scale

    def run(self, quantity: Quantity, table: float | None) -> Measured:
        """Measure one quantity; a device that cannot gives a reason."""
        try:
            if quantity == "bandwidth_gb_s":
                work, seconds, detail = self._copy()
            else:
                work, seconds, detail = self._product(quantity)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            # torch raises these for a data type or device that an operation does not support, and
            # for a device that is out of memory.
            lines = str(error).strip().splitlines()
            reason = f"torch cannot run it here: {lines[0] if lines else type(error).__name__}"
            return Measured(quantity, None, None, None, table, detail="", reason=reason)
        scale = 1e9 if quantity == "bandwidth_gb_s" else 1e12
        rates = sorted(work / second / scale for second in seconds)
        return Measured(quantity, statistics.median(rates), rates[0], rates[-1], table, detail)

    def _copy(self) -> tuple[float, list[float], str]:
        size = int(_BUFFER_BYTES[self.device.type] * self.scale)
        if self.device.type == "cuda":
            size = min(size, self.torch.cuda.mem_get_info(self.device)[0] // 4)
        source = self.torch.ones(max(size // 4, 1), dtype=self.torch.float32, device=self.device)
        target = self.torch.empty_like(source)
        size = source.numel() * 4
        seconds = self._time(lambda: target.copy_(source))
        return 2.0 * size, seconds, f"copy of {size / 2**20:.0f} MiB, read and write counted"

    def _product(self, quantity: Quantity) -> tuple[float, list[float], str]:
        """Time square products, doubled in size until one is long enough or the largest."""
        size = min(512, self.largest)
        with self._plain_fp32():
            while True:
                run = self._make_product(quantity, size)
                run()
                once = self._once(run)
                if once >= self.enough or size * 2 > self.largest:
                    break
                size *= 2
            seconds = self._time(run)
        return 2.0 * size**3, seconds, f"{size} x {size} x {size}"

    def _make_product(self, quantity: Quantity, size: int) -> Callable[[], Any]:
        torch = self.torch
        if quantity == "fp8_tflops" and self.device.type == "cpu":
            raise NotImplementedError("a CPU has no FP8 product")
        generator = torch.Generator(device=self.device).manual_seed(0)
        shape = (size, size)
        if quantity == "int8_tops":
            whole = {"dtype": torch.int8, "generator": generator, "device": self.device}
            left, right = (torch.randint(-127, 128, shape, **whole) for _ in range(2))
            # The second operand column by column, as weights [out, in] are.
            return lambda: torch._int_mm(left, right.t())
        dtype = torch.float32 if quantity == "fp32_tflops" else torch.bfloat16
        a, b = (
            torch.randn(shape, generator=generator, device=self.device, dtype=dtype)
            for _ in range(2)
        )
        if quantity == "fp8_tflops":
            one = torch.ones((), device=self.device)
            narrow = [value.to(torch.float8_e4m3fn) for value in (a, b)]
            return lambda: torch._scaled_mm(
                narrow[0], narrow[1].t(), scale_a=one, scale_b=one, out_dtype=dtype
            )
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return lambda: torch.mm(a, b.t(), out=out)

    def _plain_fp32(self) -> Any:
        """Keep FP32 products from running as TF32, as the table's figure is of plain FP32."""
        matmul = self.torch.backends.cuda.matmul
        return _Restored(matmul, "allow_tf32", False)

    def _time(self, run: Callable[[], Any]) -> list[float]:
        run()
        return [self._once(run) for _ in range(self.repeats)]

    def _once(self, run: Callable[[], Any]) -> float:
        """Time one run in seconds."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return max(time.perf_counter() - started, 1e-9)
        cuda = self.torch.cuda
        with cuda.device(self.device):
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            cuda.synchronize()
            begin.record()
            run()
            end.record()
            cuda.synchronize()
        return max(float(begin.elapsed_time(end)) / 1000, 1e-9)


class _Restored:
    """Set an attribute for a while."""

    def __init__(self, owner: Any, name: str, value: object) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.before)
