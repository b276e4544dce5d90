"""Benchmarks one after the other: none keeps the next from running."""

import run_all


def test_the_others_run_and_keep_their_rows(tmp_path, capfd):
    made = {
        "slow": "import sys, time; open(sys.argv[1], 'w').write('rows'); time.sleep(600)",
        "broken": "raise SystemExit(3)",
        "good": "import sys; open(sys.argv[1], 'w').write('rows')",
    }
    commands = {}
    for name, text in made.items():
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        commands[name] = [str(script), str(tmp_path / name)]
    assert run_all.run_one_by_one(commands, limit=5) == ["slow", "broken"]
    assert (tmp_path / "good").read_text() == (tmp_path / "slow").read_text() == "rows"
    told = capfd.readouterr().out
    assert "slow: stopped" in told and "broken: exit 3" in told and "good: exit 0" in told


def test_a_gpu_runs_benchmarks_that_exist():
    assert {f"bench_{name}.py" for name in [*run_all.CUDA, *run_all.NEEDS]} <= {
        path.name for path in run_all.HERE.glob("bench_*.py")
    }


def test_one_whose_package_is_missing_is_left_out_aloud(monkeypatch, capfd):
    monkeypatch.setattr(run_all, "NEEDS", {"there": "json", "gone": "no_such_package"})
    assert run_all.runnable(["gram", "gone", "there"]) == ["gram", "there"]
    assert capfd.readouterr().out == "gone: left out, no_such_package is not installed\n"
