"""Whatever way a card's name is typed, it is that card or a question, never another card."""

from __future__ import annotations

import re

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advisor.errors import InputError
from advisor.hardware.index import catalogue_entries
from advisor.hardware.matching import find_entry

ENTRIES = catalogue_entries()


@st.composite
def typed_names(draw):
    """A card's name with its spaces, case and brand changed, and perhaps a word too many."""
    entry = draw(st.sampled_from(ENTRIES))
    words = entry.name.split()
    separator = draw(st.sampled_from([" ", "-", "_", "  "]))
    name = separator.join(words)
    name = draw(st.sampled_from([name, name.upper(), name.lower()]))
    if draw(st.booleans()) and not entry.id.startswith("cpu"):
        name = f"{draw(st.sampled_from(['NVIDIA', 'nvidia', 'AMD', 'Intel']))} {name}"
    return entry, name


@given(typed_names())
@settings(max_examples=150, deadline=None)
def test_spelling_does_not_matter(case):
    entry, name = case
    assert find_entry(name).id == entry.id


@given(
    st.sampled_from([entry for entry in ENTRIES if not entry.id.startswith("cpu")]),
    st.sampled_from(["Super", "Laptop", "Mobile", "Max-Q", "D", "M", "2", "999GB", "NVL", "Lite"]),
)
@settings(max_examples=150, deadline=None)
def test_a_word_more_is_never_the_same_card(entry, word):
    # "B200 SXM2" names a generation of the bus that the profile leaves open, not another card.
    assume(not (word == "2" and entry.name.endswith("SXM")))
    glued = f"{entry.name}{'' if len(word) == 1 else ' '}{word}"
    try:
        found = find_entry(glued)
    except InputError:
        return
    # Only another card of the catalogue may be called so.
    assert found.id != entry.id
    assert re.search(re.escape(word), found.name, re.IGNORECASE)
