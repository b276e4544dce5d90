"""Which instruction set is chosen, by words that a processor could answer with."""

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from ops.isa import ALL

from pyprune import _native

ROOT = Path(__file__).resolve().parents[2]
# The words in the order of CpuidWords.
LEAF1_ECX, LEAF7_EBX, LEAF7_ECX, LEAF7_1_EAX, LEAF7_EDX, XCR0 = range(6)
READS_XCR0, AVX = 1 << 27, 1 << 28
MASKS_AND_ZMM, YMM, TILES = 0xE0, 0x04, 0x60000


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("processor") / "processor.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    source = ROOT / "tests" / "ops" / "processor_words.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", source, "-o", built], check=True)
    loaded = ctypes.CDLL(str(built))
    loaded.name_of.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def extensions(library):
    """name: (word, bit, the first set that needs it)"""
    return {
        library.name_of(i).decode(): (library.word_of(i), library.bit_of(i), ALL[library.set_of(i)])
        for i in range(library.extensions())
    }


class Fake:
    """A processor with everything, which a test takes something from."""

    def __init__(self, library):
        self.library = library
        self.words = [0xFFFFFFFF] * 5 + [0xE7 | TILES]

    def without(self, word, bits):
        self.words[word] &= ~bits
        return self

    def isa(self):
        return ALL[self.library.best_of((ctypes.c_uint32 * 6)(*self.words))]

    def moves_bytes(self):
        return bool(self.library.moves_bytes((ctypes.c_uint32 * 6)(*self.words)))


NAMES = ["popcnt", "fma", "f16c", "bmi", "avx2", "bmi2", "avx512f", "avx512dq", "avx512bw",
         "avx512vl", "avx512vbmi", "avx512vbmi2", "avx512vpopcntdq", "avx512bf16",
         "amx-bf16", "amx-tile"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_set_needs_all_that_it_is_compiled_with(library, extensions, name):
    word, bit, needed_by = extensions[name]
    fake = Fake(library).without(word, 1 << bit)
    assert fake.isa() == ALL[ALL.index(needed_by) - 1]
    bytes_too = needed_by in ("avx512_bf16", "avx512_amx") and name not in (
        "avx512vbmi",
        "avx512vbmi2",
    )
    assert fake.moves_bytes() == bytes_too


def test_everything_and_nothing(library):
    assert Fake(library).isa() == "avx512_amx" and Fake(library).moves_bytes()
    none = Fake(library)
    none.words = [0] * 6
    assert none.isa() == "portable" and not none.moves_bytes()


@pytest.mark.parametrize(
    ("word", "bits", "isa"),
    [
        (XCR0, 0x20000, "avx512_bf16"),
        (XCR0, 0x40000, "avx512_bf16"),
        (LEAF1_ECX, READS_XCR0, "portable"),
        (LEAF1_ECX, AVX, "portable"),
        (XCR0, YMM, "portable"),
        (XCR0, MASKS_AND_ZMM, "avx2"),
        (XCR0, 0x20, "avx2"),
        (XCR0, 0x40, "avx2"),
        (XCR0, 0x80, "avx2"),
    ],
)
def test_the_operating_system_must_save_the_registers(library, word, bits, isa):
    fake = Fake(library).without(word, bits)
    assert fake.isa() == isa and fake.moves_bytes() == (isa == "avx512_bf16")


def test_nothing_is_compiled_for_more(extensions):
    """Flags of CMakeLists.txt and pragmas of the kernels name no extension that is not looked for,
    and none for a set that comes too early."""
    assert set(extensions) == set(NAMES)
    text = (ROOT / "CMakeLists.txt").read_text()
    for isa in ("avx2", "avx512"):
        (flags,) = re.findall(rf"set\(PYPRUNE_ISA_FLAGS_{isa} ([^)]*)\)", text)
        named = set(re.findall(r"-m([a-z0-9]+)\b(?![-=])", flags))
        assert named == {name for name, (_, _, first) in extensions.items() if first == isa}
    pragmas = [
        set(names.split(","))
        for source in (ROOT / "csrc" / "cpu").iterdir()
        for names in re.findall(r"""target\("([^"]*)"\)""", source.read_text())
    ]
    assert len(pragmas) > 5
    for names in pragmas:
        assert names <= set(extensions), names
    arm = {
        name
        for source in (ROOT / "csrc" / "cpu").iterdir()
        for name in re.findall(r"\.arch_extension (\w+)", source.read_text())
    }
    assert arm == {"bf16"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is x86's")
def test_this_processor_is_read_right(library, extensions):
    words = (ctypes.c_uint32 * 6)()
    assert library.words_here(words) == len(words)
    cpuinfo = Path("/proc/cpuinfo").read_text()
    (flags,) = re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)[:1]
    # Linux spells these with underscores, BMI with its number.
    spelt = {name: name for name in NAMES}
    spelt |= {name: f"avx512_{name[6:]}" for name in ("avx512vbmi2", "avx512vpopcntdq")}
    spelt |= {"bmi": "bmi1", "avx512bf16": "avx512_bf16"}
    spelt |= {"amx-bf16": "amx_bf16", "amx-tile": "amx_tile"}
    saved = words[XCR0] & 0xE6 == 0xE6  # else Linux hides what it would have to save
    for name, (word, bit, _) in extensions.items():
        there, listed = bool(words[word] >> bit & 1), spelt[name] in flags.split()
        assert there == listed if saved else there >= listed, name
    assert _native.MODULE is not None, _native.MISSING
    _native.MODULE.set_isa("best")
    assert _native.MODULE.isa() == ALL[library.best_of(words)]


def test_bf16_on_arm_is_a_bit_of_what_linux_says(library):
    best = library.arm_best_of
    best.argtypes = [ctypes.c_uint64]
    assert ALL[best(0)] == "portable" and ALL[best(1 << 14)] == "neon_bf16"
    assert ALL[best(0xFFFFFFFFFFFFFFFF & ~(1 << 14))] == "portable"


@pytest.mark.parametrize("best", ALL)
def test_a_processor_has_its_own_sets_alone(library, best):
    x86 = ALL[: ALL.index("neon_bf16")]
    mine = ("portable", best) if best == "neon_bf16" else x86[: x86.index(best) + 1]
    found = [isa for i, isa in enumerate(ALL) if library.includes(ALL.index(best), i)]
    assert set(found) == set(mine)


@pytest.mark.skipif(platform.machine() == "x86_64", reason="elsewhere than on x86")
def test_other_processors_have_none_of_x86s_sets():
    assert _native.MODULE is not None, _native.MISSING
    assert _native.MODULE.isa() in ("portable", "neon_bf16")
    with pytest.raises(ValueError, match="does not have avx2"):
        _native.MODULE.set_isa("avx2")
