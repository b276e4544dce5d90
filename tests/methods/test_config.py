import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.config import CalibrationConfig, PruneConfig
from pyprune.errors import UserError
from pyprune.methods import METHODS
from pyprune.patterns import NM, Unstructured

names = st.text(min_size=1, max_size=12)
calibrations = st.builds(
    CalibrationConfig,
    source=names,
    nsamples=st.integers(1, 10**6),
    seqlen=st.integers(1, 10**6),
    batch_size=st.integers(1, 1000),
    seed=st.integers(0, 2**63),
    padding=st.sampled_from(["windows", "documents"]),
    bos=st.sampled_from([None, True, False]),
)


@st.composite
def configs(draw):
    method = draw(st.sampled_from(sorted(METHODS)))
    row = METHODS[method]
    values = {
        "method": method,
        "update": draw(st.sampled_from(row.updates)),
        "preserve_zeros": draw(st.booleans()),
        "damping": draw(st.floats(0, 1)),
        "block_size": draw(st.integers(1, 4096)),
        "include": tuple(draw(st.lists(names, min_size=1, max_size=3))),
        "exclude": tuple(draw(st.lists(names, max_size=3))),
        "walk": draw(st.sampled_from(["single", "two-pass", "naive"])),
        "spill": draw(st.sampled_from(["none", "host", "disk"])),
        "device": draw(st.sampled_from(["auto", "cpu", "cuda", "cuda:3"])),
        "dtype": draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"])),
        "calibration": draw(calibrations),
    }
    if method == "gblm":
        own = {"alpha": st.floats(0, 1e6), "norm": st.sampled_from(["l1", "l2"])}
        values["method_options"] = draw(st.fixed_dictionaries({}, optional=own))
    if draw(st.booleans()):
        m = draw(st.integers(1, 32))
        values["pattern"] = f"{draw(st.integers(1, m))}:{m}"
    else:
        values["sparsity"] = draw(st.floats(0, 1, exclude_max=True))
        if values["update"] != "iterative":
            values["scope"] = draw(st.sampled_from([None, *row.scopes]))
    return PruneConfig(**values)


@settings(max_examples=50, deadline=None)
@given(configs())
def test_round_trips_through_yaml_and_dicts(config):
    assert PruneConfig.from_yaml(config.to_yaml()) == config
    assert PruneConfig.from_dict(config.to_dict()) == config
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


def test_defaults_are_the_papers():
    config = PruneConfig(sparsity=0.5)
    assert config.method == "sparsegpt" and config.find_method().default_scope == "block"
    assert (config.damping, config.block_size) == (0.01, 128)
    assert (config.calibration.nsamples, config.calibration.seqlen) == (128, 2048)


def test_target_is_the_pattern():
    assert PruneConfig(pattern="1:4").target() == NM(1, 4)
    assert PruneConfig(sparsity=0.3, scope="row").target() == Unstructured(0.3, "row")


@pytest.mark.parametrize(
    "sparsity, words",
    [(0.5, "50%"), (0.07, "7%"), (0.005, "0.5%"), (1 / 3, "33.3333%"), (1e-9, "0.0000001%")],
)
def test_a_share_is_shown_as_it_is(sparsity, words):
    assert str(Unstructured(sparsity)) == words
    assert str(Unstructured(sparsity, "row")) == f"{words} row"


def test_reads_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: wanda\npattern: '2:4'\ncalibration:\n  nsamples: 3\n")
    config = PruneConfig.load(path)
    assert (config.method, config.pattern) == ("wanda", "2:4")
    assert config.calibration == CalibrationConfig(nsamples=3)
    with pytest.raises(UserError, match=r"cannot read .*missing.yaml"):
        PruneConfig.load(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    "text, values",
    [
        ("pattern: 2:4", {"pattern": "2:4"}),
        ("{sparsity: 5e-1, damping: 1e-3}", {"sparsity": 0.5, "damping": 0.001}),
        (
            "{sparsity: .5, include: [09, 1_0, '3']}",
            {"sparsity": 0.5, "include": ("09", "1_0", "3")},
        ),
    ],
)
def test_numbers_mean_what_they_look_like(text, values):
    """In YAML 1.1 2:4 is 124 and 1e-3 a text."""
    assert PruneConfig.from_yaml(text) == PruneConfig(**values)


@pytest.mark.parametrize("name", ["1e5", "2:4", "12", "0x1", "09", "1_0", ".5", "1.", "no", "~"])
def test_texts_that_look_like_numbers_stay_texts(name):
    config = PruneConfig(sparsity=0.5, include=(name,))
    assert PruneConfig.from_yaml(config.to_yaml()) == config
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


def test_lists_become_tuples():
    assert PruneConfig(sparsity=0.5, include=["a", "b"]).include == ("a", "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected exactly one of sparsity and pattern, got neither"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of sparsity and pattern, got"),
        ({"sparsity": 1.0}, r"sparsity: expected a fraction in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity: expected a fraction in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, "sparsity: expected a number, got nan"),
        ({"sparsity": "half"}, "sparsity: expected a number, got 'half'"),
        ({"sparsity": True}, "sparsity: expected a number, got True"),
        ({"pattern": "5:4"}, "1 <= N <= M, got 5:4"),
        ({"pattern": "0:4"}, "1 <= N <= M, got 0:4"),
        ({"pattern": "2x4"}, "pattern: expected N:M such as 2:4, got '2x4'"),
        ({"pattern": 24}, "pattern: expected text, got 24"),
        ({"pattern": "2:4", "scope": "row"}, "scope: expected none with pattern 2:4, got 'row'"),
        ({"sparsity": 0.5, "scope": "column"}, "scope: expected one of .*, got 'column'"),
        (
            {"sparsity": 0.5, "method": "wanda", "scope": "block"},
            "scope: wanda takes row, layer, global, got 'block'",
        ),
        (
            {"sparsity": 0.5, "method": "sparse-gpt"},
            r"method: expected one of .*, got 'sparse-gpt' \(did you mean sparsegpt\?\)",
        ),
        ({"sparsity": 0.5, "method_options": [1]}, "expected a mapping of names to values"),
        ({"sparsity": 0.5, "method_options": {"alpha": 1}}, "sparsegpt has no option 'alpha'"),
        ({"sparsity": 0.5, "method": "gblm", "method_options": {"norm": 1}}, "gblm norm: expected"),
        ({"sparsity": 0.5, "method": 3}, "method: expected text, got 3"),
        (
            {"sparsity": 0.5, "update": "sequential"},
            r"update: sparsegpt takes none \(it updates the weights itself\), got 'sequential'",
        ),
        ({"sparsity": 0.5, "method": "wanda", "update": "twice"}, "update: expected one of"),
        (
            {"sparsity": 0.5, "method": "wanda", "update": "iterative", "scope": "layer"},
            "update: iterative compares within rows, got scope 'layer'",
        ),
        ({"sparsity": 0.5, "score_mass": True}, "score_mass: a variant of wanda, got .*sparsegpt"),
        (
            {"pattern": "2:4", "method": "wanda", "score_mass": True},
            "score_mass: expected unstructured scope row, got N:M",
        ),
        (
            {"sparsity": 0.5, "method": "wanda", "score_mass": True, "update": "iterative"},
            "score_mass: expected update none or sequential, got 'iterative'",
        ),
        (
            {"sparsity": 0.5, "method": "wanda", "reference_count": True},
            "reference_count: wanda has no use for it",
        ),
        (
            {"sparsity": 0.5, "scope": "row", "reference_count": True},
            "reference_count: for sparsegpt expected scope block, got row",
        ),
        (
            {"pattern": "2:4", "method": "magnitude", "reference_count": True},
            "reference_count: for magnitude expected scope layer, got N:M",
        ),
        ({"sparsity": 0.5, "damping": -1}, r"damping: expected a number in \[0, 1.0\], got -1"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size: expected at least 1 column, got 0"),
        ({"sparsity": 0.5, "block_size": 1.5}, "block_size: expected a whole number, got 1.5"),
        ({"sparsity": 0.5, "walk": "backwards"}, "walk: expected one of .*, got 'backwards'"),
        ({"sparsity": 0.5, "spill": "tape"}, "spill: expected one of .*, got 'tape'"),
        ({"sparsity": 0.5, "dtype": "int8"}, "dtype: expected one of .*, got 'int8'"),
        ({"sparsity": 0.5, "device": "tpu"}, "device: expected auto, .*, got 'tpu'"),
        ({"sparsity": 0.5, "device": "cpu:1"}, "device: expected auto, .*, got 'cpu:1'"),
        ({"sparsity": 0.5, "include": "model.*"}, "include: expected a list of texts"),
        ({"sparsity": 0.5, "exclude": [1]}, "exclude: expected a list of texts"),
        ({"sparsty": 0.5}, "config: unknown key 'sparsty', did you mean sparsity?"),
        ({"zzz": 0.5}, "config: unknown key 'zzz'; known: method, sparsity"),
        (
            {"sparsity": 0.5, "calibration": {"nsample": 3}},
            "calibration: unknown key 'nsample', .*",
        ),
        ({"sparsity": 0.5, "calibration": "wiki"}, "calibration: expected a mapping .*'wiki'"),
        ({"sparsity": 0.5, "calibration": {"nsamples": 0}}, "nsamples: expected at least 1, got 0"),
        ({"sparsity": 0.5, "calibration": {"seed": -1}}, "seed: expected 0 or more, got -1"),
        ({"sparsity": 0.5, "calibration": {"padding": "left"}}, "padding: expected one of"),
        ({"sparsity": 0.5, "calibration": {"bos": 1}}, "bos: expected true or false, got 1"),
        ({"sparsity": 0.5, "calibration": {"source": ""}}, "source: expected a name or a path"),
        ({"sparsity": 0.5, "calibration": {"seqlen": "8"}}, "seqlen: expected a whole number"),
    ],
)
def test_says_what_is_wrong(values, message):
    with pytest.raises(UserError, match=message) as error:
        PruneConfig.from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "config: expected a mapping of names to values, got"),
        ("a: [", "config: expected YAML, got something else"),
        ("", "expected exactly one of sparsity and pattern"),
        ("sparsity: 0.5\nmethod: wanda\nsparsity: 0.6", "the key 'sparsity' is there twice"),
        ("sparsity: 0.5\ncalibration: {seed: 1, seed: 2}", "the key 'seed' is there twice"),
    ],
)
def test_yaml_that_is_no_config(text, message):
    with pytest.raises(UserError, match=message) as error:
        PruneConfig.from_yaml(text)
    assert "\n" not in str(error.value)
