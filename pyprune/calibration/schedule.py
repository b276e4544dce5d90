"""Which matrices of a block read the same tensor, and in which order they run.

A site is a place in the forward where prunable matrices are applied: one linear map, or one
projection of all experts of a fused module. A stage is the sites that read the very same tensor (q,
k and v; gate and up; with parallel attention the first MLP matrix too): one statistic serves them
and they are pruned together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyprune.errors import LayerError
from pyprune.models.experts import ExpertInput, observed
from pyprune.models.linears import LinearRef


@dataclass(eq=False)
class Site:
    """`linears` has one entry, or the experts of one projection that may be pruned, in order."""

    name: str
    linears: list[LinearRef]

    @property
    def fused(self) -> bool:
        return self.linears[0].index is not None


class SiteInput(NamedTuple):
    """The input `x [..., C]` of `site.linears[member]`; `rows [t]` are those of the `tokens` that
    reached the experts which it comes from; None for a linear map, which sees every token."""

    member: int
    x: Tensor
    rows: Tensor | None = None
    tokens: int = 0


Observer = Callable[[Site, list[SiteInput]], None]


@dataclass(eq=False)
class Stage:
    sites: list[Site] = field(default_factory=list)

    @property
    def leader(self) -> Site:
        """The site that runs first."""
        return self.sites[0]


class TensorId:
    """Recognises one tensor as long as nothing wrote to it, without keeping it alive."""

    def __init__(self, x: Tensor) -> None:
        self._ref = weakref.ref(x)
        self._version = x._version

    def matches(self, x: Tensor) -> bool:
        return self._ref() is x and self._version == x._version


def sites_of(linears: list[LinearRef]) -> list[Site]:
    """The sites of a block's matrices, in definition order."""
    sites: dict[str, Site] = {}
    for ref in linears:
        name = ref.name if ref.index is None else ref.parameter_name
        sites.setdefault(name, Site(name, [])).linears.append(ref)
    return list(sites.values())


@contextmanager
def observing(sites: list[Site], observe: Observer) -> Iterator[None]:
    """Within the context `observe(site, inputs)` is called whenever a site is about to run. Hooks
    and replaced forwards are gone afterwards, whatever happens."""
    with ExitStack() as stack:
        fused: dict[nn.Module, dict[str, Site]] = {}
        for site in sites:
            module = site.linears[0].module
            if site.fused:
                fused.setdefault(module, {})[site.linears[0].parameter] = site
            else:
                hook = module.register_forward_pre_hook(_hook(site, observe), with_kwargs=True)
                stack.callback(hook.remove)
        for module, projections in fused.items():
            stack.enter_context(observed(module, _expert_observer(projections, observe)))
        yield


def _hook(site: Site, observe: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        observe(site, [SiteInput(0, x)])

    return hook


def _expert_observer(
    projections: dict[str, Site], observe: Observer
) -> Callable[[nn.Module, str, list[ExpertInput]], None]:
    def observe_experts(module: nn.Module, projection: str, inputs: list[ExpertInput]) -> None:
        if projection in projections:
            site = projections[projection]
            given = [inputs[ref.index] for ref in site.linears if ref.index is not None]
            observe(site, [SiteInput(k, i.x, i.rows, i.tokens) for k, i in enumerate(given)])

    return observe_experts


def without(name: str) -> str:
    """What to do about a matrix that cannot be pruned."""
    return f"(leave it out with --exclude '*.{name.rpartition('.')[2]}')"


def runs_twice(name: str) -> str:
    return "runs more than once in a forward of its block, so that it has no one input " + without(
        name
    )


def find_stages(sites: list[Site], run_block: Callable[[], None]) -> list[Stage]:
    """Runs the block once and reports which sites read the same tensor, in the order they ran.

    Raises:
        LayerError: a site did not run or ran twice, so that it has no one input.
    """
    stages: list[tuple[TensorId | None, Stage]] = []
    ran: set[Site] = set()

    def observe(site: Site, inputs: list[SiteInput]) -> None:
        if site in ran:
            raise LayerError(site.name, runs_twice(site.name))
        ran.add(site)
        x = inputs[0].x
        for tensor, stage in stages:
            if not site.fused and tensor is not None and tensor.matches(x):
                stage.sites.append(site)
                return
        stages.append((None if site.fused else TensorId(x), Stage([site])))

    with observing(sites, observe):
        run_block()
    for site in sites:
        if site not in ran:
            raise LayerError(
                site.name,
                "expected to be called in the forward of its block, and is not "
                + without(site.name),
            )
    return [stage for _, stage in stages]
