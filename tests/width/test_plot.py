"""Pictures of width runs: which there are for which method, and that they show what happened."""

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny_models import tiny_model, tiny_tokens

from pyprune.width import plot
from pyprune.width.config import WidthConfig
from pyprune.width.plot import draw
from pyprune.width.run import prune_width

BOTH = {"kept", "importance-heads", "importance-mlp", "parameters"}
GQA = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}


def decided(method, family="llama", ratio=0.2, **options):
    model = tiny_model(family, num_hidden_layers=4, **(GQA if family == "llama" else {}))
    config = WidthConfig(method, ratio=ratio, method_options=options)
    return prune_width(model, [tiny_tokens(2, 16)], config).decision


@pytest.mark.parametrize("method, family, options, names", [
    ("flap", "llama", {"structure": "adaptive"}, BOTH),
    ("wanda-sp", "mixtral", {"units": "mlp"}, {"kept", "importance-mlp", "parameters"}),
    ("multipruner", "llama", {"steps": 4}, {*BOTH, "perplexity"}),
    ("slicegpt", "llama", {}, {"parameters"}),  # has no units
    ("disp-llm", "llama", {"iterations": 2}, {"kept", "importance-mlp", "parameters"}),
    ("llm-surgeon-width", "llama", {"shots": 1}, BOTH),
])  # fmt: skip
def test_pictures_of_each_method(method, family, options, names, tmp_path):
    decision = decided(method, family, **options)
    files = draw("tiny", decision, tmp_path / "pictures")
    assert {file.stem for file in files} == names
    (one,) = draw("tiny", decision, tmp_path / "all.png")
    assert imread(one).shape[0] > max(imread(file).shape[0] for file in files)
    for file in files:
        assert imread(file)[..., :3].std() > 0.05


def painted(paint, *args):
    axis = Figure().subplots()
    paint(axis, *args)
    return axis


def test_bars_are_what_is_left():
    decision = decided("flap", structure="adaptive")
    axis = painted(plot._kept, decision, 4)
    written = [text.get_text() for text in axis.texts]
    for kind, at in (("heads", 0), ("mlp", 4)):
        groups = [g for g, place in decision.groups.items() if place[0] == kind]
        left = [decision.units[g] - len(decision.removed.get(g, [])) for g in groups]
        assert written[at : at + 4] == [f"{count:,}" for count in left]
    heights = [bar.get_height() for bar in axis.patches]
    assert sum(h > 0 for h in heights) == 8 + sum(n > 0 for n in decision.zeroed.values())


def test_parameters_add_up():
    for decision in (decided("multipruner", steps=4), decided("flap", structure="adaptive")):
        axis = painted(plot._parameters, decision)
        ends = {}
        for bar in axis.patches:
            row = round(bar.get_y() + bar.get_height() / 2)
            ends[row] = max(ends.get(row, 0), bar.get_x() + bar.get_width())
        assert ends[0] * 1e6 == pytest.approx(decision.parameters[0])
        assert ends[1] * 1e6 == pytest.approx(decision.parameters[1])


def test_small_numbers_keep_their_digits():
    """A tiny model's matrices are hundredths of a million."""
    decision = decided("flap", structure="adaptive")
    written = painted(plot._parameters, decision).texts
    shares = [text.get_text().split("\n") for text in written]
    before = decision.parameters[0] / 1e6
    for number, percent in shares:
        assert float(number) == pytest.approx(before * float(percent[:-1]) / 100, abs=before / 150)
    assert all(float(number) > 0 for number, _ in shares)


def test_branches_that_went_have_nothing_left():
    decision = decided("multipruner", steps=4, blocks=0.8)
    assert decision.branches
    for group, (kind, layer, _) in decision.groups.items():
        went = ("A" if kind == "heads" else "M") + str(layer) in decision.branches
        assert (plot._left(decision, group) == 0) == went


def test_the_cut_lies_between_deciles():
    tenths = [float(i * i) for i in range(11)]
    assert plot._at(0.5, tenths) == 25 and plot._at(0.55, tenths) == pytest.approx(30.5)
    assert plot._at(1.0, tenths) == 100
