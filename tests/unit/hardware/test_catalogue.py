"""Names as people type them, and profiles as people write them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from advisor.errors import InputError
from advisor.hardware import index
from advisor.hardware.catalogue import check_profiles, find_profile, list_profiles, load_profile
from advisor.hardware.index import catalogue_entries
from advisor.hardware.names import parse_name, split_count
from advisor.plan.data import profiles_folder, set_extra_folders

RESOLVES = {
    "RTX 4090": "rtx4090",
    "rtx4090": "rtx4090",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "rtx_4090": "rtx4090",
    "  RTX  4090 ": "rtx4090",
    "GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA RTX4090": "rtx4090",
    "rtx 4090 24gb": "rtx4090",
    "RTX 4090 (24 GB)": "rtx4090",
    "4090 graphics card": "rtx4090",
    "3090 ti": "rtx3090ti",
    "RTX3090Ti": "rtx3090ti",
    "3090": "rtx3090",
    "4070ti": "rtx4070ti",
    "RTX 4070": "rtx4070",
    "2080 Ti": "rtx2080ti",
    "RTX 3060 12GB": "rtx3060-12",
    "3060-12": "rtx3060-12",
    "3060 12g": "rtx3060-12",
    "RTX 3080 10 GB": "rtx3080-10",
    "4060 ti 16gb": "rtx4060ti-16",
    "5090": "rtx5090",
    "RTX 5070 Ti": "rtx5070ti",
    "A100 80GB PCIe": "a100-pcie-80",
    "A100-PCIE-80GB": "a100-pcie-80",
    "a100 pcie 80": "a100-pcie-80",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80",
    "a100 sxm 80gb": "a100-sxm-80",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40",
    # Both 40 GB cards have the same figures but for power: the answer is the same.
    "A100 40GB": "a100-pcie-40",
    "H100 PCIe": "h100-pcie",
    "NVIDIA H100 PCIe": "h100-pcie",
    "H100 SXM": "h100-sxm",
    "h100-sxm5": "h100-sxm",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "H200": "h200-sxm",
    "NVIDIA H200": "h200-sxm",
    "B200": "b200",
    "L4": "l4",
    "nvidia l4": "l4",
    "NVIDIA L4 Tensor Core GPU": "l4",
    "L40S": "l40s",
    "t4": "t4",
    "Tesla T4": "t4",
    "P100": "p100-pcie-16",
    "p40": "p40",
    "Tesla V100-PCIE-16GB": "v100-pcie-16",
    "V100 SXM2 32GB": "v100-sxm2-32",
    "A10": "a10",
    "A10G": "a10g",
    "NVIDIA A10G": "a10g",
    "A30 PCIe": "a30",
    "A6000": "a6000",
    "NVIDIA RTX A6000": "a6000",
    "RTX 6000 Ada": "rtx6000ada",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "RTX PRO 6000": "rtxpro6000",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtxpro6000",
    "NVIDIA GH200 480GB": "gh200-96",
    "DGX Spark": "gb10",
    "MI300X": "mi300x",
    "AMD Instinct MI300X": "mi300x",
    "7900 XTX": "rx7900xtx",
    "Radeon RX 7900 XTX": "rx7900xtx",
    "Arc A770 16GB": "arc-a770-16",
    "Intel Arc Pro B60": "arc-pro-b60",
    "Apple M1": "cpu-apple-m1",
    "cpu-spr-8ch": "cpu-spr-8ch",
}

ASKS = {
    "3060": {"rtx3060-12"},
    "RTX 3060": {"rtx3060-12"},
    "3080": {"rtx3080-10"},
    "4060 Ti": {"rtx4060ti-16"},
    "a100": {"a100-pcie-40", "a100-pcie-80", "a100-sxm-40", "a100-sxm-80"},
    "A100 80GB": {"a100-pcie-80", "a100-sxm-80"},
    "A100 PCIe": {"a100-pcie-40", "a100-pcie-80"},
    "H100": {"h100-pcie", "h100-sxm"},
    "H100 80GB": {"h100-pcie", "h100-sxm"},
    "V100": {"v100-pcie-16", "v100-sxm2-32"},
    "V100 32GB": {"v100-sxm2-32"},
    "GH200": {"gh200-96", "gh200-141"},
    "RTX 6000": {"a6000", "rtx6000ada", "rtxpro6000"},
    "Jetson": {"agx-orin-64", "orin-nano-8", "orin-nano-super-8", "thor-t5000"},
    "avx2": {"cpu-avx2-ddr4-2ch", "cpu-avx2-ddr5-2ch"},
}

NEVER = [
    "L40",  # neither the L4 nor the L40S
    "A100X",
    "A10M",
    "A4000",
    "A1000",
    "4090 Laptop",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "RTX 4090 D",
    "RTX 4090 48GB",
    "RTX 4080 Super",
    "RTX 4080 Ti",
    "4070 Ti Super",
    "4070 Super",
    "RTX 4070 GDDR6",
    "RTX 3060 Ti",
    "RTX 3060 8GB",
    "RTX 3080 12GB",
    "RTX 3080 Ti",
    "RTX 2080",
    "RTX 5090 Laptop",
    "GTX 4090",
    "RX 4090",
    "Quadro RTX 6000",
    "RTX PRO 6000 Max-Q",
    "RTX PRO 6000 Blackwell Server Edition",
    "H100 NVL",
    "H200 NVL",
    "V100 SXM3 32GB",
    "P100 SXM2",
    "P100 12GB",
    "MI250",
    "MI300A",
    "MI300",
    "7900 XT",
    "Arc A40",
    "A770M",
    "90",
    "rtx",
    "",
    "NVIDIA",
]


@pytest.mark.parametrize(("typed", "expected"), RESOLVES.items())
def test_name_resolves(typed, expected):
    profile = find_profile(typed)
    assert (profile.id, profile.count) == (expected, 1)


@pytest.mark.parametrize(("typed", "choices"), ASKS.items())
def test_name_of_several_cards_asks_which(typed, choices):
    with pytest.raises(InputError) as caught:
        find_profile(typed)
    message = str(caught.value)
    assert "may be any of" in message
    named = {entry.id for entry in catalogue_entries() if f" {entry.id} (" in message}
    assert named == choices


@pytest.mark.parametrize("typed", NEVER)
def test_name_of_another_card_never_resolves(typed):
    with pytest.raises(InputError):
        find_profile(typed)


@pytest.mark.parametrize(
    ("typed", "expected", "count"),
    [
        ("2x RTX 4090", "rtx4090", 2),
        ("2xRTX4090", "rtx4090", 2),
        ("2x4090", "rtx4090", 2),
        ("2 x 4090", "rtx4090", 2),
        ("2 × RTX 4090", "rtx4090", 2),
        ("4*a100-sxm-80", "a100-sxm-80", 4),
        ("RTX 4090 x2", "rtx4090", 2),
        ("4090x2", "rtx4090", 2),
        ("8xH100 SXM", "h100-sxm", 8),
        ("2x 7900 XTX", "rx7900xtx", 2),
    ],
)
def test_count(typed, expected, count):
    profile = find_profile(typed)
    assert (profile.id, profile.count) == (expected, count)
    # Figures stay those of one device.
    assert profile.memory_bytes == find_profile(expected).memory_bytes
    assert profile.to_plan().count == count


@pytest.mark.parametrize("typed", ["0x RTX 4090", "RTX 4090 x0"])
def test_count_of_zero_is_refused(typed):
    with pytest.raises(InputError, match="at least 1, but got 0"):
        find_profile(typed)


def test_count_is_not_read_out_of_a_name():
    assert split_count("7900 XTX") == ("7900 xtx", 1)
    assert split_count("mi250x") == ("mi250x", 1)


def test_every_id_name_and_alias_resolves_to_itself():
    entries = catalogue_entries()
    assert len(entries) >= 60
    for entry in entries:
        content = yaml.safe_load(entry.path.read_text(encoding="utf-8"))
        for name in (entry.id, entry.name, *content.get("aliases", ())):
            for typed in (name, name.upper(), f"{content['vendor']} {name}", f"2x {name}"):
                if content["kind"] == "cpu" and typed.startswith(content["vendor"]):
                    continue
                assert find_profile(typed).id == entry.id, typed


def test_no_two_profiles_share_a_full_name():
    owners: dict[object, str] = {}
    for entry in catalogue_entries():
        for name in entry.names:
            assert owners.setdefault(name, entry.id) == entry.id


def test_unknown_name_suggests():
    with pytest.raises(InputError, match="Did you mean 'rtx4090'"):
        find_profile("rtx 4091")
    with pytest.raises(InputError, match=r"There is rtx4090 .*24 GB"):
        find_profile("4090 48GB")
    with pytest.raises(InputError, match="not rtx4090"):
        find_profile("4090 Laptop")


def test_what_a_name_says_is_taken_apart():
    parsed = parse_name("NVIDIA A100-SXM4-80GB")
    assert (parsed.base, parsed.bus, parsed.memory_gib) == ("a100", "sxm4", 80)
    parsed = parse_name("NVIDIA H100 80GB HBM3")
    assert (parsed.base, parsed.memory_gib, parsed.memory_type) == ("h100", 80, "hbm3")


def test_shipped_profiles_have_no_faults():
    assert check_profiles(profiles_folder()) == ()
    assert len(list_profiles()) == len(catalogue_entries())


# A user's own profiles.

OWN = """
id: {id}
name: {name}
vendor: NVIDIA
kind: gpu
compute_capability: "8.9"
figures:
  memory_gib: {{value: 48, grade: user, source: label}}
"""


@pytest.fixture
def own(tmp_path):
    yield tmp_path
    set_extra_folders(())


def test_user_adds_a_card_by_dropping_a_file(own):
    (own / "rtx4090-48.yaml").write_text(OWN.format(id="rtx4090-48", name="RTX 4090 48GB"))
    set_extra_folders([own])
    assert find_profile("RTX 4090 48GB").id == "rtx4090-48"
    assert find_profile("RTX 4090").id == "rtx4090"
    assert "rtx4090-48" in {profile.id for profile in list_profiles()}


def test_user_replaces_a_shipped_card_by_its_id(own):
    (own / "hardware").mkdir()
    (own / "hardware" / "l4.yaml").write_text(OWN.format(id="l4", name="My L4"))
    set_extra_folders([own])
    assert find_profile("l4").name == "My L4"
    assert find_profile("l4").memory_bytes == 48 * 2**30


def test_users_alias_settles_what_would_be_asked(own):
    text = OWN.format(id="our-a100", name="Our A100") + "aliases: [A100]\n"
    (own / "our-a100.yaml").write_text(text)
    set_extra_folders([own])
    assert find_profile("a100").id == "our-a100"


def test_edited_file_is_read_again(own):
    path = own / "mine.yaml"
    path.write_text(OWN.format(id="mine", name="First"))
    set_extra_folders([own])
    assert find_profile("First").id == "mine"
    path.write_text(OWN.format(id="mine", name="Second name"))
    import os

    os.utime(path, ns=(1, 1))
    assert find_profile("Second name").id == "mine"


FAULTS = {
    "unknown key": (OWN + "bandwith: 3\n", "unknown key 'bandwith'. Did you mean"),
    "unknown figure": (OWN + "  bandwidth_gbs: {{value: 1, grade: user, source: x}}\n",
                       "'figures.bandwidth_gbs'. Did you mean 'bandwidth_gb_s'"),
    "figure without source": (OWN + "  tdp_w: {{value: 1, grade: user}}\n",
                              "figures.tdp_w.source is missing"),
    "unknown grade": (OWN + "  tdp_w: {{value: 1, grade: rumour, source: x}}\n",
                      "figures.tdp_w.grade"),
    "zero": (OWN + "  tdp_w: {{value: 0, grade: user, source: x}}\n", "greater than 0"),
    "not a number": (OWN + "  tdp_w: {{value: .nan, grade: user, source: x}}\n", "finite"),
    "sparse": (OWN + "  fp8_tflops: {{value: 1, grade: user, source: with sparsity}}\n",
               "dense"),
    "unquoted capability": (OWN.replace('"8.9"', "8.9"), "must be quoted: '8.9'"),
    "wrong vendor": (OWN.replace("NVIDIA", "AMD"), "compute_capability is NVIDIA's"),
    "id is not the file": (OWN.replace("{id}", "other"), "id must be its file's name"),
    "no name": (OWN.replace("name: {name}\n", ""), "name is missing"),
    "no yaml": ("kind: gpu\nid: [\n", "must be valid YAML"),
    "a list": ("- 1\nfigures:\n", "valid YAML"),
    "just text": ("kind: gpu", "id is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_each_fault(own, fault):
    text, words = FAULTS[fault]
    (own / "mine.yaml").write_text(text.format(id="mine", name="Mine"))
    faults = check_profiles(own)
    assert len(faults) == 1
    assert words in faults[0]
    assert str(own / "mine.yaml") in faults[0]


def test_check_lists_the_faults_of_all_files(own):
    (own / "a.yaml").write_text(OWN.format(id="a", name="Same name"))
    (own / "b.yaml").write_text(OWN.format(id="b", name="Same Name"))
    (own / "c.yaml").write_text("kind: gpu\n")
    (own / "d.yaml").write_text("what: ever\n")
    faults = check_profiles(own)
    assert len(faults) == 3
    assert any("d.yaml" in fault and "kind cannot be told" in fault for fault in faults)
    assert any("c.yaml" in fault for fault in faults)
    assert any("also that of a" in fault for fault in faults)


def test_check_of_a_missing_folder(tmp_path):
    assert "no folder" in check_profiles(tmp_path / "none")[0]


def test_profile_whose_names_are_no_texts_is_named(own):
    (own / "mine.yaml").write_text(OWN.format(id="mine", name="[1, 2]"))
    set_extra_folders([own])
    with pytest.raises(InputError, match=r"mine\.yaml: name must be a text"):
        find_profile("l4")


def test_file_in_another_order_is_read_too(own):
    text = "figures:\n  memory_gib: {value: 4, grade: user, source: x}\n"
    text += "kind: gpu\nvendor: NVIDIA\nid: odd\nname: Odd Card\n"
    (own / "odd.yaml").write_text(text)
    set_extra_folders([own])
    assert find_profile("odd card").memory_bytes == 4 * 2**30


def test_pure_python_yaml_gives_the_same(monkeypatch):
    path = next(entry.path for entry in catalogue_entries() if entry.id == "rtx4090")
    fast = load_profile(path)
    monkeypatch.setattr(index, "_Loader", yaml.SafeLoader)
    assert load_profile(path) == fast


def test_lookup_validates_only_the_chosen_profile_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom advisor.hardware.catalogue import find_profile\nfind_profile('l4')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pynvml', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(("name", "mebibytes"), [
    ("t4", 15360), ("l4", 23034), ("a10", 23028), ("a10g", 23028), ("a40", 46068), ("l40s", 46068),
    ("h100-sxm", 81559), ("a100-sxm-80", 81920),
])  # fmt: skip
def test_memory_is_what_the_driver_shows(name, mebibytes):
    """GDDR6 with error correction keeps a sixteenth for its codes: an L4 has no 24 GiB."""
    assert find_profile(name).memory_bytes == mebibytes * 2**20
