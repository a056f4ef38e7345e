from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from advisor.plan.files import load_plan
from advisor.report.bits_map import bits_map, stored_bits
from advisor.report.page import render_report
from advisor.report.sections import size_text

GOLDEN = Path(__file__).parents[2] / "golden" / "plan.yaml"
MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


@pytest.fixture(scope="module")
def plan():
    return load_plan(GOLDEN)


@pytest.fixture(scope="module")
def page(plan):
    return render_report(plan, MODULES)


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_nothing_is_fetched_and_nothing_runs(page):
    elements = Elements(page)
    assert elements.open == []  # every element is closed
    for tag, attributes in elements.found:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "onload", "onclick"} & attributes.keys()
    outside = [url for url in re.findall(r"https?://[^\"' <)]*", page) if "www.w3.org" not in url]
    assert outside == []
    assert "@import" not in page
    assert "url(" not in page


def test_the_figures_are_there(page):
    text = Elements(page).text
    for figure in (
        "mixed-4.25bpw", "GeForce RTX 4090", "4.25", "2.13%", "[1.54, 2.72]", "0.0192", "93.1%",
        "21.73, 21.28", "118.4 kB", "gptq-int4-g64-sym", "loss: the upper bound 4.41% is above 3%",
        "60 trials", "3e164753", "torch 2.13.0", "builtin:calibration",
    ):  # fmt: skip
        assert figure in text, figure


def test_a_chart_of_loss_against_size_and_a_map_of_bits(page):
    assert page.count("<svg") == 2
    assert "down_proj" in page


def test_the_map_tells_group_sizes_of_one_width_apart(plan):
    modules = {MODULES[0]: "gptq-int4-g32-asym", MODULES[1]: "gptq-int4-gch-sym"}
    scheme = plan.scheme.model_copy(
        update={
            "default": "gptq-int4-g128-sym",
            "modules": modules,
            "format": "compressed-tensors",
        }
    )
    text = render_report(plan.model_copy(update={"scheme": scheme}), MODULES)
    for line in (
        "gptq-int4-g32-asym, 4.63 bits", "gptq-int4-g128-sym, 4.13 bits", "gptq-int4-gch-sym, 4.00",
        "self_attn.q_proj, block 0: gptq-int4-g32-asym",
    ):  # fmt: skip
        assert line in text, line
    shades = [int(found) for found in re.findall(r'height="14" fill="hsl\(212 60% (\d+)%\)"', text)]
    assert len(shades) == 3
    assert shades == sorted(shades, reverse=True)  # more bits are darker
    assert shades[0] - shades[-1] > 25  # though the widths are all four
    # A style, as an attribute would lose against the style sheet's colour of text.
    assert 'style="fill:#fff"' in text


@pytest.mark.parametrize(
    ("scheme", "format_name", "bits"),
    [
        ("gptq-int4-g64-sym", "gptq", 4 + 20 / 64 + 0.0078),  # g_idx: 32 bits an input
        ("awq-int4-g64-asym", "awq", 4 + 20 / 64),
        ("rtn-fp8-gch-afp8", "compressed-tensors", 8.004),
        ("nvfp4", "compressed-tensors", 4.5),
        ("gguf-q4_k", "gguf", 4.5),
        ("gguf-q4_k_m", "gguf", 4),
        ("bf16", "compressed-tensors", 16),
    ],
)
def test_bits_of_a_scheme_count_its_scales(scheme, format_name, bits):
    assert stored_bits(scheme, format_name) == pytest.approx(bits, abs=5e-3)


@pytest.mark.parametrize("blocks", [1, 49, 50, 61, 126, 200])
def test_every_block_of_a_deep_model_is_inside_the_map(blocks):
    schemes = {
        f"model.layers.{block}.mlp.{part}": f"gptq-int{bits}-g128-sym"
        for block in range(blocks)
        for part, bits in (("up_proj", 4), ("down_proj", 8))
    }
    drawn = bits_map(schemes, "compressed-tensors")
    _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', drawn)[1].split())
    cells = re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="20"[^>]*><title>(\S+ \S+ \d+)',
        drawn,
    )
    assert len({title for *_, title in cells}) == 2 * blocks
    assert max(float(x) + float(wide) for x, _, wide, _ in cells) <= width
    assert max(float(y) + 20 for _, y, _, _ in cells) <= height
    assert len({(x, y) for x, y, _, _ in cells}) == 2 * blocks


def test_experts_of_a_block_share_a_cell_of_the_map():
    schemes = {
        f"model.layers.{block}.mlp.experts.{expert}.{part}": "gptq-int4-g64-sym"
        for block in range(2)
        for expert in range(64)
        for part in ("gate_proj", "up_proj")
    }
    schemes["model.layers.1.mlp.experts.7.up_proj"] = "gptq-int8-g64-sym"
    schemes["model.layers.0.mlp.shared_expert.up_proj"] = "gptq-int8-g64-sym"
    drawn = bits_map(schemes, "compressed-tensors")
    assert re.findall(r'text-anchor="end">([^<]*)', drawn) == [
        "gate_proj", "experts up", "shared up",
    ]  # fmt: skip
    assert "block 1: gptq-int4-g64-sym, 4.25 bits, 63 of 64 experts" in drawn
    assert drawn.count("<title>") == 5


def test_sizes_within_one_budget_differ_in_words():
    assert [size_text(size) for size in (2_019_133, 2_016_567, 118_004_000, 5_728_000_000, 118_400)
            ] == ["2.019 MB", "2.017 MB", "118.0 MB", "5.728 GB", "118.4 kB"]  # fmt: skip


def test_names_cannot_write_html(plan):
    evil = "<script>alert('x')</script>"
    model = plan.model.model_copy(update={"id": evil})
    lost = plan.runners_up[0].model_copy(update={"name": evil, "reason": evil})
    page = render_report(plan.model_copy(update={"model": model, "runners_up": (lost,)}))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_plan_that_measured_nothing_still_has_a_page(plan):
    bare = plan.model_copy(
        update={
            "calibration": None,
            "evaluation": None,
            "search": None,
            "runners_up": (),
            "expected": plan.expected.model_copy(
                update={"basis": "score", "kl": None, "loss": None, "top1_agreement": None}
            ),
        }
    )
    elements = Elements(render_report(bare))
    assert elements.open == []
    assert "Predicted by the search" in elements.text


def test_a_name_that_points_share_is_written_once():
    from advisor.report.charts import Point, frontier

    points = [
        Point("mixed-4.61bpw", 118_000_000, kl, kl * 0.9, kl * 1.1, kl == 0.05)
        for kl in (0.12, 0.05, 0.04)
    ]
    drawn = frontier([*points, Point("bnb-nf4", 110_000_000, 0.3, 0.2, 0.4)], None)
    labels = re.findall(r'<text class="(label[^"]*)"[^>]*>([^<]*)</text>', drawn)
    assert labels == [("label", "bnb-nf4"), ("label strong", "mixed-4.61bpw")]
    assert drawn.count("<title>mixed-4.61bpw</title>") == 3


def test_a_plan_that_meets_no_budgets_says_so_before_its_figures(plan, page):
    assert "Not within" not in page
    nearest = plan.model_copy(update={"unmet": "loss 4.10% (3.80% to 4.40%) exceeds <3%"})
    text = Elements(render_report(nearest, MODULES)).text
    assert "this came nearest: loss 4.10% (3.80% to 4.40%) exceeds <3%." in text
    assert text.index("Not within the budgets.") < text.index("KL per token")


def test_labels_stay_with_their_points_and_clear_of_each_other():
    """Thirteen points of a search that found nothing small enough; some names find no room."""
    from advisor.report.charts import Point, frontier

    sizes = (2.842, 2.435, 2.36, 2.362, 2.306, 2.182, 2.178, 2.086, 1.957, 1.957, 1.957)
    losses = (1e-5, 15e-5, 25e-5, 23e-5, 3e-4, 59e-5, 85e-5, 116e-5, 28e-4, 146e-4, 156e-4)
    points = [
        Point(f"mixed-{index}.06bpw", int(1e6 * size), kl, kl * 0.9, kl * 1.1, index == 2)
        for index, (size, kl) in enumerate(zip(sizes, losses, strict=True))
    ]
    drawn = frontier(points, 900_000)
    circles = {
        name: (float(x), float(y)) for x, y, name in
        re.findall(r'<circle [^>]*cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>([^<]*)<', drawn)
    }  # fmt: skip
    labels = [
        (name, float(x), float(y), anchor) for x, y, anchor, name in re.findall(
            r'class="label[^>]* x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', drawn)
    ]  # fmt: skip
    assert 5 <= len(labels) <= len(points)
    assert "mixed-2.06bpw" in [name for name, *_ in labels]
    for name, x, y, _ in labels:
        assert abs(x - circles[name][0]) <= 10
        assert abs(y - circles[name][1]) <= 30
    for name, x, y, anchor in labels:
        for other, x2, y2, anchor2 in labels:
            if name != other and abs(y - y2) < 13:
                left, left2 = (
                    at - 11 * 6.5 if side == "end" else at
                    for at, side in ((x, anchor), (x2, anchor2))
                )
                assert abs(left - left2) > 11 * 6.5, (name, other)
    budget = re.search(r'x="([\d.]+)" y="26" text-anchor="(\w+)">budget<', drawn)
    assert budget[2] == "start", "it would lie on the numbers of the axis"


@pytest.mark.parametrize(("low", "high"), [(-3.8, -3.6), (-3.72, -3.7), (-4.0, -1.0)])
def test_an_axis_has_numbers_however_short_it_is(low, high):
    from advisor.report.charts import log_ticks, tick_text

    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 12
    assert all(float(tick_text(tick)) == pytest.approx(tick, rel=1e-3) for tick in ticks)
    assert max(len(tick_text(tick)) for tick in ticks) <= 7
    assert all(10**low <= tick * 1.0001 and tick <= 10**high * 1.0001 for tick in ticks)
