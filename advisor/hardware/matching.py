"""Which card a typed name means: one, or a question, never a guess."""

from __future__ import annotations

from advisor.errors import InputError, did_you_mean
from advisor.hardware.index import Entry, catalogue_entries, read_mapping
from advisor.hardware.names import ParsedName, parse_name


def find_entry(name: str) -> Entry:
    """Find a card's entry by name, as :func:`find_profile` does, without its figures.

    Raises:
        InputError: The name fits no card or several.
    """
    entries = catalogue_entries()
    slug = name.strip().lower()
    for entry in entries:
        if entry.id == slug:
            return entry
    query = parse_name(name)
    exact = [entry for entry in entries if query in entry.names]
    if len({entry.order for entry in exact}) > 1:
        exact = [entry for entry in exact if entry.order == max(other.order for other in exact)]
    if len(exact) == 1:
        return exact[0]
    matches = exact or [
        entry for entry in entries if any(_fits(query, known, entry) for known in entry.names)
    ]
    shared = [entry for entry in entries if query in entry.shared and entry not in matches]
    variants = () if exact else _fitting_variants(query, entries)
    if not matches and not shared:
        raise _unknown(name, query, entries, variants)
    if len(matches) == 1 and not shared and not variants:
        return matches[0]
    if not shared and not variants and (one := _same_but_power(matches)) is not None:
        return one
    raise _ambiguous(name, matches + shared, variants)


def match_device(name: str, memory_gib: float | None) -> Entry | None:
    """Find the card that a driver names, or None: another card's figures are worse than none.

    Args:
        name: As NVML prints it; it may leave out what tells two cards apart.
        memory_gib: Memory that the driver reports; it decides between cards of one name and
            refuses a card of another size.

    Raises:
        InputError: A profile's names cannot be read.
    """
    entries = catalogue_entries()
    query = parse_name(name)
    exact = [entry for entry in entries if query in entry.names]
    fitting = exact or [
        entry for entry in entries if any(_fits(query, known, entry) for known in entry.names)
    ]
    matches = [entry for entry in fitting if _memory_agrees(memory_gib, entry.memory_gib)]
    strongest = [entry for entry in matches if entry.order == max(e.order for e in matches)]
    if len(strongest) == 1:
        return strongest[0]
    return _same_but_power(strongest) if strongest else None


def _memory_agrees(reported: float | None, nominal: float | None) -> bool:
    """Whether a driver's memory may be that of a card: ECC and firmware take up to an eighth."""
    if reported is None or nominal is None:
        return True
    return 0.87 <= reported / nominal <= 1.02


def _fits(query: ParsedName, known: ParsedName, entry: Entry | None) -> bool:
    """Whether everything that the query says is true of this card.

    Args:
        query: What was typed.
        known: One of the card's names.
        entry: The card; None for a variant without a profile.
    """
    if query.base != known.base:
        return False
    names = (known,) if entry is None else entry.names
    # A card whose name says no bus is a PCIe card.
    buses = {name.bus for name in names if name.bus} or {"pcie"}
    if query.bus is not None and not any(_same_bus(query.bus, bus) for bus in buses):
        return False
    memories = {name.memory_gib for name in names if name.memory_gib}
    if entry is not None and entry.memory_gib is not None:
        memories.add(round(entry.memory_gib))
    if query.memory_gib is not None and query.memory_gib not in memories:
        return False
    kinds = {name.memory_type for name in names if name.memory_type}
    return query.memory_type is None or not kinds or query.memory_type in kinds


def _same_bus(asked: str, known: str) -> bool:
    """Whether ``sxm`` and ``sxm4`` agree; ``sxm3`` and ``sxm2`` do not."""
    return asked.startswith(known) or known.startswith(asked)


def _fitting_variants(query: ParsedName, entries: tuple[Entry, ...]) -> tuple[str, ...]:
    return tuple(
        name for entry in entries for name, known in entry.variants if _fits(query, known, None)
    )


def _same_but_power(matches: list[Entry]) -> Entry | None:
    """Return the match of least power if the figures of all differ in nothing else."""
    figures = [dict(read_mapping(entry.path).get("figures") or {}) for entry in matches]
    powers = [(figure.pop("tdp_w", None) or {}).get("value") for figure in figures]
    values = [
        {name: figure.get("value") for name, figure in table.items() if isinstance(figure, dict)}
        for table in figures
    ]
    if any(table != values[0] for table in values) or None in powers:
        return None
    return min(zip(powers, matches, strict=True), key=lambda pair: float(pair[0] or 0))[1]


def _ambiguous(name: str, matches: list[Entry], variants: tuple[str, ...]) -> InputError:
    choices = ", ".join(f"{entry.id} ({entry.name})" for entry in matches)
    text = f"The GPU must be one card, but {name!r} may be any of: {choices}"
    if variants:
        text += f", or {', '.join(variants)} (no profile of it yet)"
    return InputError(f"{text}. Type for example --gpu {matches[0].id}.")


def _unknown(
    name: str, query: ParsedName, entries: tuple[Entry, ...], variants: tuple[str, ...]
) -> InputError:
    family = [
        f"{entry.id} ({entry.name}, {_memory(entry)})"
        for entry in entries
        if any(known.base == query.base for known in entry.names)
    ]
    hint = f" {variants[0]} has no profile yet." if variants else ""
    if family:
        hint += f" There is {', '.join(family)}."
    else:
        spellings = {text: entry.id for entry in entries for text in entry.spellings}
        bases = [known.base for entry in entries for known in entry.names]
        hint += did_you_mean(name, spellings) or did_you_mean(query.base, bases)
        hint = hint or _longest_start(query.base, entries)
    return InputError(
        f"The GPU must be one of the catalogue, but got {name!r}.{hint} `advisor profiles list` "
        "shows all; a YAML file in a folder of $ADVISOR_PROFILES adds one."
    )


def _memory(entry: Entry) -> str:
    return "memory not known" if entry.memory_gib is None else f"{entry.memory_gib:g} GB"


def _longest_start(base: str, entries: tuple[Entry, ...]) -> str:
    """Suggest the card whose name the unknown one begins with: RTX 4090 for ``4090 Laptop``."""
    starts = {
        known.base: entry
        for entry in entries
        for known in entry.names
        if len(known.base) > 2 and base.startswith(known.base)
    }
    if not starts:
        return ""
    entry = starts[max(starts, key=len)]
    return f" It is not {entry.id} ({entry.name})."
