"""State files: a search that goes on where another stopped."""

from itertools import pairwise

import pytest
from depth_searches import close, config, model_of, of_share, search, seconds_of, tokens
from limited_files import limited_files
from tiny_models import tiny_model

from pyprune.errors import UserError


def test_continues_from_its_state_file(tmp_path, monkeypatch):
    from pyprune.depth import walkdown

    file = str(tmp_path / "state.json")
    model = model_of("llama", 4)
    for mode in ("exact", "fast"):
        options = {"mode": mode, "audit_every": 3}
        whole = search(model, config(count=5, **options))
        search(model, config(count=3, state=file, **options))
        scored = []
        original = walkdown.WalkDown.score

        def counted(self, units, *args, _of=original, _to=scored):
            _to.append(len(units))
            return _of(self, units, *args)

        monkeypatch.setattr(walkdown.WalkDown, "score", counted)
        close(search(model, config(count=5, state=file, **options)), whole)
        assert sum(scored) == whole.steps[3].evaluations + whole.steps[4].evaluations
        monkeypatch.setattr(walkdown.WalkDown, "score", original)
        (tmp_path / "state.json").unlink()
    search(model, config(count=2, state=file))
    with pytest.raises(UserError, match="of another configuration"):
        search(model, config(count=2, state=file, objective="kl"))
    with pytest.raises(UserError, match="of another calibration text"):
        search(model, config(count=2, state=file), tokens((2, 3)))
    with pytest.raises(UserError, match="of another model"):
        search(tiny_model("llama", 1, num_hidden_layers=4), config(count=2, state=file))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot continue"):
        search(model, config(count=2, state=file))


@pytest.mark.parametrize(("mode", "by"), [("exact", "latency"), ("fast", "params")])
def test_a_state_file_serves_any_share(mode, by, tmp_path, monkeypatch):
    """Also where the target had cut off what the last removals count for."""
    from pyprune.depth import budget

    model, data = model_of("llama", 6), tokens((2, 2, 2, 2))
    ratios = (0.25, 0.5, 0.1, 0.4, 0.25)
    options = {"mode": mode, "audit_every": 3, "blocks": "pairs"}
    monkeypatch.setattr(budget, "branch_seconds", seconds_of)
    fresh = {ratio: search(model, of_share(ratio, by, **options), data) for ratio in set(ratios)}
    lists = [fresh[ratio].removed for ratio in sorted(fresh)]
    assert any(b[: len(a)] != a for a, b in pairwise(lists))  # worth a test
    times = 1.0
    for ratio in ratios:
        monkeypatch.setattr(
            budget, "branch_seconds",
            lambda graph, batch, t=times: tuple(
                {b: s * t for b, s in x.items()} if isinstance(x, dict) else x * t
                for x in seconds_of(graph, batch)
            ),
        )  # fmt: skip
        times *= 1.5  # what was measured first stays what counts
        state = str(tmp_path / "state.json")
        close(search(model, of_share(ratio, by, state=state, **options), data), fresh[ratio])
    with pytest.raises(UserError, match="of another configuration"):
        search(model, of_share(0.3, by, state=state, compare="score", **options), data)
    other = "latency" if by == "params" else "params"
    with pytest.raises(UserError, match="of another configuration"):
        search(model, of_share(0.3, other, state=state, **options), data)


def test_notes_are_of_rounds_that_were_made(tmp_path):
    """Also when the state file is of a search that went further."""
    model, data = model_of("llama", 8), tokens((2, 2, 2, 2))
    options = {"mode": "fast", "audit_every": 1, "looks": 1, "state": str(tmp_path / "state.json")}
    long = search(model, config(count=8, **options), data)
    short = search(model, config(count=2, **options), data)
    rounds = [int(note.split(":")[0].removeprefix("round ")) for note in long.notes]
    assert rounds == sorted(rounds) and rounds[-1] > 2
    assert short.notes == tuple(n for n, r in zip(long.notes, rounds, strict=True) if r <= 2)
    assert search(model, config(count=8, **options), data).notes == long.notes


def test_states_that_were_cached_before_a_resumption_are_not_used(tmp_path):
    """A lazy round may begin deep down, at a state of the model without what a file named."""
    file, model = str(tmp_path / "state.json"), model_of("llama", 6)
    options = {"mode": "fast", "audit_every": 0, "looks": 2}
    whole = search(model, config(count=6, **options))
    for count in range(1, 6):
        search(model, config(count=count, state=file, **options))
    close(search(model, config(count=6, state=file, **options)), whole)


def test_a_full_disk_is_one_line_and_leaves_the_file_before(tmp_path):
    file, model = tmp_path / "state.json", model_of("llama", 4)
    search(model, config(count=1, state=str(file)))
    before = file.read_bytes()
    with (
        pytest.raises(UserError, match=f"state: cannot write into {tmp_path}: File too large"),
        limited_files(len(before)),
    ):
        search(model, config(count=3, state=str(file)))
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
