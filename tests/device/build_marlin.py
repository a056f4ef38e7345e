"""Compile the Marlin kernel for test_marlin.py: ``python build_marlin.py SOURCES OUTPUT.so``.

SOURCES is ``gptqmodel_ext/marlin`` of an unpacked gptqmodel 7.6 wheel. It needs nvcc and the
headers of the torch that will load the library (``--torch``, the folder of that package), but
neither a GPU nor CUDA's mathematical libraries. Only tiles that products of 1 to 8, 9 to 16 and 64
rows choose are compiled; others are refused, not computed wrongly.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GROUPS = {"kU4B8": (-1, 2, 4, 8), "kU4": (-1, 2, 4, 8), "kU8B128": (-1, 2, 4, 8),
          "kU8": (-1, 4, 8), "kFE4M3fn": (-1, 8), "kFE2M1f": (1, 2)}  # fmt: skip
"""Weight types, and for each the inputs of a group in 16s; -1 is per channel."""
TILES = [
    (threads, blocks_m, blocks_n, blocks_k, narrow)
    for blocks_m, narrow in ((1, "true"), (1, "false"), (4, "false"))
    for threads, blocks_n, blocks_k in (
        (256, *((8, 8) if blocks_m == 1 else (16, 4))), (128, 8, 4), (128, 4, 8),
    )
]  # fmt: skip
DTYPES = {"half": "kFloat16", "nv_bfloat16": "kBFloat16"}
CONTEXT = """#pragma once
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
namespace at::cuda { using c10::cuda::getCurrentCUDAStream; }
"""
"""All that the sources use of ATen/cuda/CUDAContext.h, which wants the headers of cuBLAS."""
FLAGS = [
    "-O3", "-std=c++17", "-static-global-template-stub=false", "--expt-relaxed-constexpr",
    "-diag-suppress=177,179", "-Xcompiler", "-fPIC",
    "-Xptxas", "-O3,-dlcm=ca", "-Xfatbin", "-compress-all", "-cudart", "shared",
]  # fmt: skip


def instances() -> dict[tuple[str, str, int], list[tuple[str, str]]]:
    """Return the condition and the template arguments of each kernel, by file."""
    found = {}
    for dtype, own in DTYPES.items():
        for kind, groups in GROUPS.items():
            for group in groups:
                scale = own
                if kind == "kFE2M1f":
                    scale = "kFE4M3fn" if group == 1 else "kFE8M0fnu"
                if scale == "kFE8M0fnu" and dtype == "half":
                    continue
                found[dtype, kind, group] = [
                    (
                        f"q_type == vllm::{kind} && group_blocks == {group}"
                        f" && thread_m_blocks == {m} && thread_n_blocks == {n}"
                        f" && thread_k_blocks == {k} && m_block_size_8 == {narrow}"
                        f" && num_threads == {threads}",
                        f"{dtype}, vllm::{kind}.id(), vllm::{scale}.id(), {threads}, {m}, {n}, {k},"
                        f" {narrow}, pipe_stages, {group}, false",
                    )
                    for threads, m, n, k, narrow in TILES
                ]
    return found


def adapt(folder: Path) -> None:
    """Write the kernels' files, and let the choice of a kernel know no other than these."""
    choices: dict[str, str] = {dtype: "" for dtype in DTYPES}
    for (dtype, kind, group), kernels in instances().items():
        lines = ['#include "kernel.h"', '#include "marlin_template.h"', "namespace marlin {"]
        for condition, arguments in kernels:
            lines.append(f"template __global__ void Marlin<{arguments}>(MARLIN_KERNEL_PARAMS);")
            choices[dtype] += f"if ({condition}) return Marlin<{arguments}>;\n"
        (folder / f"kernel_{dtype}_{kind}_{group}.cu").write_text("\n".join([*lines, "}", ""]))
    path = folder / "gptq_marlin.cu"
    text = path.read_text()
    first = text.index("  int num_bits = q_type.size_bits();\n  auto kernel = MarlinDefault;\n")
    last = text.index("  return kernel;\n", first)
    body = "if (stages != pipe_stages || has_act_order || is_zp_float) return MarlinDefault;\n"
    for dtype, chosen in choices.items():
        body += f"if constexpr (std::is_same<scalar_t, {dtype}>::value) {{\n{chosen}}}\n"
    text = (
        text[:first] + body + "return MarlinDefault;\n" + text[last + len("  return kernel;\n") :]
    )
    # No release of torch has the type's header where the sources look for it.
    text = text.replace("ATen/native/quantized/Float8_e8m0fnu.h", "c10/util/Float8_e8m0fnu.h")
    path.write_text(text)
    path = folder / "core" / "scalar_type.hpp"  # half of a kernel's compilation is this header
    light = "".join(f"#include <{name}>\n" for name in ("string", "tuple", "variant", "cstdint"))
    path.write_text(
        path.read_text().replace(
            "#include <torch/library.h>", "#include <c10/util/Exception.h>\n" + light
        )
    )
    (folder / "ATen" / "cuda").mkdir(parents=True)
    (folder / "ATen" / "cuda" / "CUDAContext.h").write_text(CONTEXT)


def build(sources: Path, output: Path, torch: Path, architecture: str, jobs: int) -> None:
    """Compile everything in a temporary folder and link it to the output."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "marlin"
        shutil.copytree(sources, folder)
        for path in [*folder.glob("kernel_*.cu"), *folder.glob("gptq_marlin_[bf]*16.cu"),
                     *folder.glob("*.cpp")]:  # fmt: skip
            path.unlink()
        shutil.copy(Path(__file__).parent / "marlin_operations.cpp", folder)
        adapt(folder)
        flags = [*FLAGS, "-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        include = torch / "include"
        paths = [f"-I{p}" for p in (folder, include, include / "torch/csrc/api/include")]

        def compiled(path: Path) -> Path:
            done = path.with_suffix(".o")
            subprocess.run(["nvcc", *flags, *paths, "-c", str(path), "-o", str(done)], check=True)
            return done

        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compiled, [*folder.glob("*.cu"), *folder.glob("*.cpp")]))
        libraries = [
            f"-l{name}" for name in ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")
        ]
        subprocess.run(
            ["nvcc", *flags, "-shared", *map(str, objects), "-o", str(output),
             f"-L{torch / 'lib'}", *libraries], check=True,
        )  # fmt: skip
        subprocess.run(["strip", "--strip-unneeded", str(output)], check=True)


def main() -> None:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sources", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--torch", type=Path, required=True, help="folder of the torch package")
    parser.add_argument("--architecture", default="90", help="90 is that of an H100")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    build(given.sources, given.output, given.torch, given.architecture, given.jobs)


if __name__ == "__main__":
    main()
