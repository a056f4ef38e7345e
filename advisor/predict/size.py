"""Checkpoint sizes from the tensor list: exact, per format, file headers included."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from advisor.errors import InputError, did_you_mean, join_errors
from advisor.modelspec import ModelSpec, ShapeClass
from advisor.modelspec.outer import outer_modules
from advisor.predict.gguf import gguf_size, mixture_size
from advisor.predict.storage import Part, canonical_format, module_parts
from advisor.schemes import BF16, Scheme

_USUAL_GROUPS = (128, 64, 32)
"""Group sizes that kernels take."""

SHARD_BYTES = 5 * 10**9
"""Size at which our writer starts another file, unless told otherwise; transformers' default."""


@dataclass(frozen=True, slots=True)
class SizeEstimate:
    """What a checkpoint occupies.

    Attributes:
        total_bytes: Bytes of the weight files, headers included.
        weight_bytes: Bytes of all tensors, with 16 bits for what is not quantized: engines turn
            float32 into that as they load it.
        bits_per_weight: Bits of the quantizable linears, scales and zero points included, over
            their number of weights.
        header_bytes: Bytes of the files' headers; of a GGUF file also the tokenizer.
        quantizable_bytes: Bytes of the quantizable linears, in whatever scheme they are.
        embedding_bytes: Bytes of the embedding table.
        head_bytes: Bytes of a head that is stored beside the embedding.
        format: Checkpoint format.
        decompressed_bytes: Bytes of all tensors with every linear in 16 bits, which a loader that
            decompresses needs.
    """

    total_bytes: int
    weight_bytes: int
    bits_per_weight: float
    header_bytes: int
    quantizable_bytes: int
    embedding_bytes: int
    head_bytes: int
    format: str
    decompressed_bytes: int


def checkpoint_size(
    spec: ModelSpec,
    schemes: Scheme | Mapping[str, Scheme],
    format: str,
    *,
    untied: bool = False,
    head: Scheme | None = None,
    outer: Mapping[str, Scheme] | None = None,
    gguf_before_2024: bool = False,
) -> SizeEstimate:
    """Compute the size of a checkpoint.

    Args:
        spec: The model.
        schemes: One scheme for every quantizable linear, or a scheme per module path; a module
            that the mapping does not name stays 16-bit. It may name embedding and head too.
        format: Checkpoint format: ``gptq``, ``awq``, ``compressed-tensors``, ``bitsandbytes``,
            ``safetensors``, ``gguf``, ``auto-round``, ``fp8``, ``mxfp4`` or ``hqq``.
        untied: Store a tied head a second time, as some publishers do; ours stays tied.
        head: Scheme of the head, for tools that quantize it too; ours stays 16-bit. A tied head
            is then stored beside its embedding.
        outer: Scheme of the embedding or the head by module path, where ``schemes`` is one for
            the linears.
        gguf_before_2024: Use llama.cpp's older mixture of q2_k.

    Returns:
        The size; embeddings, norms, biases, routers and vision towers stay as the model's files
        have them, 16-bit where those were not read (GGUF follows llama.cpp's own rules instead).

    Raises:
        InputError: Unknown format or modules, a scheme that the format does not hold, or a group
            size that does not divide the in-features of some modules (all are counted).
    """
    name = canonical_format(format)
    schemes, ends = _split(spec, schemes, outer or {})
    if name == "gguf":
        return _gguf(spec, schemes, ends, gguf_before_2024)
    counted = list(_uses(spec, schemes))
    check_group_sizes([*counted, *ends.values()])
    entries = 0
    header = 0
    quantizable = 0
    for scheme, kind in counted:
        parts = module_parts(scheme, name, kind.in_features, kind.out_features)
        quantizable += kind.count * sum(part.size_bytes for part in parts)
        header += sum(kind.count * _entry_bytes(part) + kind.name_characters for part in parts)
        entries += kind.count * len(parts)
    others = [t for t in spec.unquantized_tensors if t.name.removesuffix(".weight") not in ends]
    ends_bytes = {"embedding": 0, "head": 0}
    for role, (scheme, kind) in zip(_roles(spec, ends), ends.values(), strict=True):
        parts = module_parts(scheme, name, kind.in_features, kind.out_features)
        ends_bytes[role] += sum(part.size_bytes for part in parts)
        header += sum(_entry_bytes(part) + kind.name_characters for part in parts)
        entries += len(parts)
    width = 4 if isinstance(schemes, Scheme) and schemes.weight == "fp32" else 2
    embedding = width * sum(t.parameters for t in others if t.role == "embedding")
    plain_head = width * sum(t.parameters for t in others if t.role == "head")
    head_bytes = plain_head
    if head is not None:
        parts = module_parts(head, name, spec.hidden_size, spec.vocabulary_size)
        head_bytes = sum(part.size_bytes for part in parts)
    elif untied and spec.tied_embeddings:
        head_bytes = embedding
    other = width * sum(t.parameters for t in others) - plain_head + head_bytes
    other += sum(ends_bytes.values())
    header += sum(_entry_bytes(Part("", "BF16", t.shape)) + len(t.name) for t in others)
    weight = quantizable + other
    header = _finish_header(header, entries + len(others), weight)
    return SizeEstimate(
        total_bytes=weight + header + _beyond_16_bits(spec, schemes, ends),
        weight_bytes=weight,
        bits_per_weight=8 * quantizable / max(1, spec.quantizable_parameters),
        header_bytes=header,
        quantizable_bytes=quantizable,
        embedding_bytes=embedding + ends_bytes["embedding"],
        head_bytes=head_bytes + ends_bytes["head"],
        format=name,
        decompressed_bytes=other
        - sum(ends_bytes.values())
        + 2 * sum(kind.in_features * kind.out_features for _, kind in ends.values())
        + 2 * spec.quantizable_parameters,
    )


def _beyond_16_bits(spec: ModelSpec, schemes: Scheme | Mapping[str, Scheme], ends: Ends) -> int:
    """Return what the file holds beyond 16 bits of tensors that stay as the model has them."""
    if isinstance(schemes, Scheme) and not schemes.is_quantized:
        return 0  # bf16 or fp32 by name: cast
    excess = 0
    for tensor in spec.tensors if spec.widths else ():
        module = tensor.name.removesuffix(".weight")
        if tensor.role != "linear":
            changed = module in ends
        elif isinstance(schemes, Scheme):
            changed = True
        else:
            changed = schemes.get(module, BF16).is_quantized
        if not changed:
            excess += (tensor.width - 2) * tensor.parameters
    return excess


Ends = Mapping[str, tuple[Scheme, ShapeClass]]
"""Scheme and shape of embedding and head, by module path, where they are quantized."""


def _split(
    spec: ModelSpec, schemes: Scheme | Mapping[str, Scheme], outer: Mapping[str, Scheme]
) -> tuple[Scheme | Mapping[str, Scheme], Ends]:
    """Part the schemes of the linears from those of embedding and head."""
    modules = {module.name: module for module in outer_modules(spec)}
    if isinstance(schemes, Mapping):
        outer = {**outer, **{name: s for name, s in schemes.items() if name in modules}}
        schemes = {name: s for name, s in schemes.items() if name not in modules}
    if unknown := sorted(outer.keys() - modules.keys()):
        raise InputError(
            f"{spec.id} has no embedding or head named {', '.join(unknown)}; it has "
            f"{', '.join(modules)}."
        )
    ends = {}
    for name, scheme in outer.items():
        linear = modules[name].linear
        kind = ShapeClass(linear.in_features, linear.out_features, False, 1, len(name), name)
        if scheme.is_quantized:
            ends[name] = scheme, kind
    return schemes, ends


def _roles(spec: ModelSpec, ends: Ends) -> list[str]:
    """Return the role of each end, in their order."""
    roles = {module.name: module.role for module in outer_modules(spec)}
    return [roles[name] for name in ends]


def check_group_sizes(uses: Iterable[tuple[Scheme, ShapeClass]]) -> None:
    """Check that every group size divides the in-features it is used on.

    Raises:
        InputError: It does not; one line per scheme, each with the number of modules.
    """
    offenders: dict[Scheme, list[ShapeClass]] = {}
    for scheme, kind in uses:
        size = scheme.group_size or 0
        if scheme.granularity == "group" and scheme.is_integer and kind.in_features % size:
            offenders.setdefault(scheme, []).append(kind)
    problems = []
    for scheme, kinds in offenders.items():
        sizes = sorted({kind.in_features for kind in kinds})
        fitting = [g for g in _USUAL_GROUPS if not any(size % g for size in sizes)]
        advice = " Use one scale per channel (-gch)."
        if fitting:
            advice = f" Use group size {' or '.join(map(str, fitting[:2]))}."
        problems.append(
            f"group_size must divide in_features, but got group_size={scheme.group_size} for "
            f"{sum(kind.count for kind in kinds)} modules with in_features="
            f"{' and '.join(map(str, sizes))} (first: {kinds[0].first}).{advice}"
        )
    if problems:
        raise InputError(join_errors(problems))


def _uses(
    spec: ModelSpec, schemes: Scheme | Mapping[str, Scheme]
) -> Iterable[tuple[Scheme, ShapeClass]]:
    """Yield every scheme with the shapes it is used on, equal ones counted together."""
    if isinstance(schemes, Scheme):
        return [(schemes, kind) for kind in spec.shape_classes]
    check_modules(spec, schemes)
    counted: dict[tuple[Scheme, int, int, bool], list[int | str]] = {}
    for linear in spec.linears:
        scheme = schemes.get(linear.name, BF16)
        key = (scheme, linear.in_features, linear.out_features, linear.is_expert)
        entry = counted.setdefault(key, [0, 0, linear.name])
        entry[0] += 1  # type: ignore[operator]
        entry[1] += len(linear.name)  # type: ignore[operator]
    return [
        (scheme, ShapeClass(inputs, outputs, expert, int(count), int(characters), str(first)))
        for (scheme, inputs, outputs, expert), (count, characters, first) in counted.items()
    ]


def check_modules(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> None:
    """Check that every module of a mapping is a quantizable linear of the model.

    Raises:
        InputError: Some are not; the first three are named.
    """
    known = {linear.name for linear in spec.linears}
    if unknown := sorted(schemes.keys() - known):
        raise InputError(
            f"{len(unknown)} modules are not quantizable linears of {spec.id}: "
            f"{', '.join(unknown[:3])}.{did_you_mean(unknown[0], known)}"
        )


def _entry_bytes(part: Part) -> int:
    """Return the length of a header entry without the module's name and the offsets' digits."""
    shape = ",".join(map(str, part.shape))
    return len(f'"{part.suffix}":{{"dtype":"{part.dtype}","shape":[{shape}],"data_offsets":[,]}},')


def _finish_header(characters: int, entries: int, weight_bytes: int) -> int:
    """Add the offsets' digits and the frame of each file; padded to 8 bytes."""
    files = max(1, math.ceil(weight_bytes / SHARD_BYTES))
    digits = len(str(weight_bytes // files))
    frame = 8 + len('{"__metadata__":{"format":"pt"},}') + 3
    return characters + entries * 2 * digits + files * frame


def _gguf(
    spec: ModelSpec, schemes: Scheme | Mapping[str, Scheme], ends: Ends, before_2024: bool
) -> SizeEstimate:
    outer = {
        role: scheme.weight
        for role, (scheme, _) in zip(_roles(spec, ends), ends.values(), strict=True)
    }
    if isinstance(schemes, Mapping):
        size = mixture_size(spec, schemes, outer)
    else:
        size = gguf_size(spec, schemes, outer, before_2024=before_2024)
    return SizeEstimate(
        total_bytes=size.tensor_bytes + size.header_bytes,
        weight_bytes=size.tensor_bytes,
        bits_per_weight=8 * size.linear_bytes / max(1, spec.quantizable_parameters),
        header_bytes=size.header_bytes,
        quantizable_bytes=size.linear_bytes,
        embedding_bytes=size.embedding_bytes,
        head_bytes=size.head_bytes,
        format="gguf",
        decompressed_bytes=2 * spec.parameters,
    )
