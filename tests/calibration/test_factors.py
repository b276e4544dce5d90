"""Kronecker factors of whole models against autograd; the nearest ones on the golden example."""

import pytest
import torch
from calibration.test_backward import model64
from methods.golden import golden
from methods.test_gradient_methods import golden_gradients
from tiny_models import tiny_tokens

from pyprune.calibration.backward import PassOptions
from pyprune.calibration.batches import as_token_set
from pyprune.calibration.factors import Refinement, collect_factors
from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.calibration.sample import Sample
from pyprune.calibration.tokens import Batch
from pyprune.errors import LayerError
from pyprune.models.adapter import Adapter


def refs_of(model):
    adapter = Adapter.of(model)
    return adapter, [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


def collect(model, batches, biases=None, refinements=0, progress=None, **options):
    adapter, refs = refs_of(model)
    if biases is None:
        biases = {ref.name for ref in refs if ref.bias() is not None}
    return collect_factors(
        adapter,
        as_token_set(batches, vocabulary=64, positions=None),
        refs,
        PassOptions(**options),
        biases=biases,
        refinements=refinements,
        progress=progress,
    )


def by_hooks(model, ids):
    """Inputs and gradients of the outputs of every linear, from plain autograd."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:

            def hook(_, args, output, name=name):
                output.retain_grad()
                seen[name] = (args[0].detach(), output)

            handles.append(module.register_forward_hook(hook))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    for handle in handles:
        handle.remove()
    return {name: (x.flatten(0, 1), y.grad.flatten(0, 1)) for name, (x, y) in seen.items()}


def assert_close(got, want):
    # Norms and rotations are in fp32 in these models, whatever the rest is in.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_equal_autograd_with_the_bias_as_an_input_of_ones():
    model, ids = model64(), tiny_tokens(3, 12)
    factors = collect(model, [ids[:2], ids[2:]])
    for name, (x, g) in by_hooks(model, ids).items():
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        assert_close(factors[name].a, ones.T @ ones)
        assert_close(factors[name].g, g.T @ g)
        assert (factors[name].tokens, factors[name].targets) == (36, 33)
        a, g_mean = factors[name].normalised()
        assert float(a[-1, -1]) == pytest.approx(1.0)
        assert_close(g_mean, g.T @ g / 33)


def test_readers_of_one_tensor_share_its_factor_unless_only_one_has_a_bias():
    factors = collect(model64(), [tiny_tokens(2, 12)])
    at = "model.layers.0.self_attn."
    q, k, v, o = (factors[f"{at}{name}_proj"] for name in "qkvo")
    assert q.a is k.a and q.a is v.a and q.a is not o.a
    mixed = collect(model64(), [tiny_tokens(2, 12)], biases={f"{at}k_proj"})
    assert mixed[f"{at}k_proj"].a.shape == (33, 33) and mixed[f"{at}q_proj"].a.shape == (32, 32)
    torch.testing.assert_close(mixed[f"{at}k_proj"].a[:32, :32], mixed[f"{at}q_proj"].a)


def test_batches_padding_and_checkpointing_do_not_matter():
    ids, mask = tiny_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    batched = collect(model64(), [Batch(ids, mask)])
    alone = collect(model64(), [ids[:1], ids[1:2, :7], ids[2:]], checkpointing=True)
    for name, factors in batched.items():
        assert_close(factors.a, alone[name].a)
        assert_close(factors.g, alone[name].g)
        assert (factors.tokens, factors.targets) == (31, 28)


def test_how_often_an_expert_is_used_counts_once():
    """Per predicted token the Fisher information of an expert is (its tokens / all) times that of
    its own tokens: one factor is divided by each count."""
    model = model64("mixtral")
    factors = collect(model, [tiny_tokens(4, 16, seed) for seed in range(2)])
    name = "model.layers.0.mlp.experts.down_proj.0"
    expert, dense = factors[name], factors["model.layers.0.self_attn.q_proj"]
    assert 0 < expert.tokens < dense.tokens == 128 and expert.targets == dense.targets == 120
    a, g = expert.normalised()
    assert_close(torch.kron(g, a), torch.kron(expert.g, expert.a) / expert.tokens / 120)


def test_an_idle_expert_has_zeros():
    factors = collect(model64("mixtral"), [tiny_tokens(1, 2)])
    idle = [f for name, f in factors.items() if "experts" in name and not f.tokens]
    assert idle and all(f.dead() and not f.a.any() for f in idle)


def fisher(x, g):
    """Mean over tokens of vec(g a^T) vec(g a^T)^T."""
    rows = torch.einsum("ti,tj->tij", g, x).flatten(1)
    return rows.T @ rows / len(rows)


def rearranged_optimum(f, rows, columns):
    """Residual of the best Kronecker product, by singular values."""
    r = f.view(rows, columns, rows, columns).permute(0, 2, 1, 3).reshape(rows**2, columns**2)
    return float(torch.linalg.svdvals(r)[1:].square().sum().sqrt())


def test_golden_nearest_kronecker_product():
    _, x = golden()
    g = golden_gradients()
    sample = Sample(x, g, 31, "leader")
    factors = KroneckerFactors(4, 8, torch.device("cpu"), torch.float64)
    factors.update(sample)
    factors.sequences, factors.targets = 1, 32
    f = fisher(x, g)
    a, h = factors.normalised()
    independent = float((f - torch.kron(h, a)).norm())
    assert independent == pytest.approx(2.799447790, rel=1e-8)
    factors.a = torch.ones(8, 8, dtype=torch.float64)  # the example's start
    want = {
        2: (28.968027853, 1.417419174),
        4: (28.979600962, 1.156910930),
        10: (28.979600973, None),
    }
    for step in range(10):
        refinement = Refinement(factors, of_inputs=step % 2 == 1)
        refinement.update(sample)
        refinement.finish()
        if step + 1 in want:
            a, h = factors.normalised()
            sigma, residual = want[step + 1]
            assert float(a.norm() * h.norm()) == pytest.approx(sigma, rel=1e-9)
            if residual is not None:
                assert float((f - torch.kron(h, a)).norm()) == pytest.approx(residual, rel=1e-8)
    best = rearranged_optimum(f, 4, 8)
    assert best == pytest.approx(1.156910648, rel=1e-8) and best < independent
    assert float((f - torch.kron(h, a)).norm()) == pytest.approx(best, rel=1e-7)


def test_of_a_linear_model_with_a_bias():
    """One token a sequence: the Fisher matrix is that of autograd's gradients of weight and bias.
    A single token's is a Kronecker product, and of many the nearest one is nearer."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=gen, dtype=torch.float64)
    labels = (x[:, 0] > 0).long()
    w, b = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((3, 5), (3,)))
    w.requires_grad_(), b.requires_grad_()

    def factors_and_fisher(count):
        factors = KroneckerFactors(3, 5, torch.device("cpu"), torch.float64, bias=True)
        rows, samples = [], []
        for token, label in zip(x[:count], labels, strict=False):
            y = torch.nn.functional.linear(token, w, b)
            loss = torch.nn.functional.cross_entropy(y, label)
            dw, db, dy = torch.autograd.grad(loss, (w, b, y))
            rows.append(torch.cat([dw, db[:, None]], dim=1).flatten())
            samples.append(Sample(token[None], dy[None], 1, "leader"))
            factors.update(samples[-1])
        factors.sequences = factors.targets = count
        rows = torch.stack(rows)
        return factors, samples, rows.T @ rows / count

    def error(factors, f):
        a, g = factors.normalised()
        return float((f - torch.kron(g, a)).norm())

    one, _, f = factors_and_fisher(1)
    assert error(one, f) < 1e-14
    many, samples, f = factors_and_fisher(40)
    independent = error(many, f)
    for step in range(6):
        refinement = Refinement(many, of_inputs=step % 2 == 1)
        for sample in samples:
            refinement.update(sample)
        refinement.finish()
    best = rearranged_optimum(f, 3, 6)
    assert best == pytest.approx(error(many, f), rel=1e-3) and best < 0.95 * independent


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_refined_factors_are_nearer_to_the_fisher_information(family):
    model, ids = model64(family), tiny_tokens(3, 12)
    plain, near = collect(model, [ids]), collect(model, [ids], refinements=2)
    for name, (x, g) in by_hooks(model, ids).items():
        if name not in plain or len(g[0]) * len(x[0]) > 600:
            continue
        rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if plain[name].bias else x
        f = fisher(rows, g) * len(x) / plain[name].targets
        errors = []
        for factors in (plain[name], near[name]):
            a, h = factors.normalised()
            errors.append(float((f - torch.kron(h, a)).norm()))
            assert bool((torch.linalg.eigvalsh(a) > -1e-6 * a.norm()).all())
        best = rearranged_optimum(f, len(g[0]), len(rows[0]))
        # The residual of independent factors need not be rescaled: the nearest are below it.
        assert best <= errors[1] < errors[0] and errors[1] < 1.05 * best, name


def test_a_gradient_that_is_nan_names_the_layer():
    model = model64()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(LayerError, match=r"model\.layers\.\S+: expected finite"):
        collect(model, [tiny_tokens()])


def test_sums_that_overflow_name_the_layer():
    model = model64().float()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e20)
    with pytest.raises(LayerError, match=r"model\.layers\.\S+: expected finite sums"):
        collect(model, [tiny_tokens()])


def test_tells_how_far_all_passes_are():
    told = []
    collect(model64(), [tiny_tokens(2, 8)], refinements=1, progress=lambda *p: told.append(p))
    assert told == [(n, 6) for n in range(1, 7)]
