"""What masked conjugate gradients do between their products, one row a program.

tensor               | dtype | shape  | layout
---------------------|-------|--------|-----------
x, residual, p, z/hp | fp32  | [R, C] | contiguous
mask                 | bool  | [R, C] | contiguous
rz, loss, noise      | fp64  | [R]    | contiguous
radau, step          | fp64  | [R]    | contiguous; see `ops.masked_cg.Steps`
active               | bool  | [R]    | contiguous

Each kernel reads its row twice, once for the scalar product and once to move: the second time out
of the cache. The products themselves are cuBLAS's.
"""

import torch
import triton
import triton.language as tl

from pyprune.ops.masked_cg import Problem

BLOCK = 1024


@triton.jit
def _turn_kernel(
    residual_ptr,
    mask_ptr,
    z_ptr,
    p_ptr,
    rz_ptr,
    radau_ptr,
    step_ptr,
    loss_ptr,
    noise_ptr,
    active_ptr,
    tolerance,
    least,
    C,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    active = tl.load(active_ptr + row).to(tl.int1)
    if active:
        base = row.to(tl.int64) * C
        acc = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            kept = tl.load(mask_ptr + base + cols, mask=cols < C, other=0).to(tl.int1)
            z = tl.load(z_ptr + base + cols, mask=kept, other=0.0)
            acc += z * tl.load(residual_ptr + base + cols, mask=kept, other=0.0)
        rz = tl.sum(acc, axis=0).to(tl.float64)
        before = tl.load(rz_ptr + row)
        tl.store(rz_ptr + row, rz)
        radau = tl.load(radau_ptr + row)
        ratio = 0.0
        if not FIRST:
            left = radau - tl.load(step_ptr + row)
            radau = tl.where(left > 0.0, left / (least * left + rz / before), 1.0 / least)
            tl.store(radau_ptr + row, radau)
            ratio = (rz / before).to(tl.float32)
        bound = tolerance * (tl.maximum(tl.load(loss_ptr + row), 0.0) + tl.load(noise_ptr + row))
        # Written so that a NaN goes on: it ends at the last iteration, with a gap that says so.
        tl.store(active_ptr + row, (radau * rz <= bound) == 0)
        for start in range(0, C, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            kept = tl.load(mask_ptr + base + cols, mask=cols < C, other=0).to(tl.int1)
            z = tl.load(z_ptr + base + cols, mask=kept, other=0.0)
            p = tl.load(p_ptr + base + cols, mask=kept, other=0.0)
            tl.store(p_ptr + base + cols, z + ratio * p, mask=cols < C)


@triton.jit
def _advance_kernel(
    x_ptr,
    residual_ptr,
    mask_ptr,
    hp_ptr,
    p_ptr,
    rz_ptr,
    step_ptr,
    loss_ptr,
    active_ptr,
    C,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    active = tl.load(active_ptr + row).to(tl.int1)
    if active:
        base = row.to(tl.int64) * C
        acc = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            # p is zero where the mask is not set: hp needs no mask here.
            p = tl.load(p_ptr + base + cols, mask=cols < C, other=0.0)
            acc += p * tl.load(hp_ptr + base + cols, mask=cols < C, other=0.0)
        curvature = tl.sum(acc, axis=0).to(tl.float64)
        goes_on = curvature > 0
        tl.store(active_ptr + row, goes_on)
        if goes_on:
            rz = tl.load(rz_ptr + row)
            step = rz / curvature
            tl.store(step_ptr + row, step)
            tl.store(loss_ptr + row, tl.load(loss_ptr + row) - step * rz)
            along = step.to(tl.float32)
            for start in range(0, C, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                kept = tl.load(mask_ptr + base + cols, mask=cols < C, other=0).to(tl.int1)
                p = tl.load(p_ptr + base + cols, mask=kept, other=0.0)
                hp = tl.load(hp_ptr + base + cols, mask=kept, other=0.0)
                x = tl.load(x_ptr + base + cols, mask=kept, other=0.0)
                r = tl.load(residual_ptr + base + cols, mask=kept, other=0.0)
                tl.store(x_ptr + base + cols, x + along * p, mask=kept)
                tl.store(residual_ptr + base + cols, r - along * hp, mask=kept)


def _options(columns: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(4, block // 128))}


class TritonSteps:
    """`ops.masked_cg.Steps` on the kernels of this file."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem, self.tolerance = problem, tolerance
        self.rz, self.step = torch.zeros_like(problem.loss), torch.zeros_like(problem.loss)
        self.radau = torch.full_like(problem.loss, 1 / problem.near.least)
        self.active = torch.ones_like(problem.loss, dtype=torch.bool)

    def turn(self, p: torch.Tensor, z: torch.Tensor, first: bool) -> None:
        self._launch(_turn_kernel, z_ptr=z, p_ptr=p, radau_ptr=self.radau,
                     noise_ptr=self.problem.noise, tolerance=self.tolerance,
                     least=self.problem.near.least, FIRST=first)  # fmt: skip

    def advance(self, p: torch.Tensor, hp: torch.Tensor) -> None:
        self._launch(_advance_kernel, x_ptr=self.problem.x, hp_ptr=hp, p_ptr=p)

    def _launch(self, kernel: triton.JITFunction, **own: object) -> None:
        """With the arguments that both kernels take, and the `own` ones of one."""
        rows, columns = self.problem.x.shape
        kernel[(rows,)](
            residual_ptr=self.problem.residual,
            mask_ptr=self.problem.mask,
            rz_ptr=self.rz,
            step_ptr=self.step,
            loss_ptr=self.problem.loss,
            active_ptr=self.active,
            C=columns,
            **own,
            **_options(columns),
            enable_fp_fusion=True,
        )


def _aot(kernel: triton.JITFunction, **constexprs: bool) -> dict:
    doubles = dict.fromkeys(["rz_ptr", "radau_ptr", "step_ptr", "loss_ptr", "noise_ptr"], "*fp64")
    flags = {"mask_ptr": "*i1", "active_ptr": "*i1"}
    scalars = {"C": "i32", "tolerance": "fp32", "least": "fp32"}
    known = doubles | flags | scalars  # what is left are rows of fp32
    return {
        "kernel": kernel,
        "signature": {name: known.get(name, "*fp32") for name in kernel.arg_names},
        "constexprs": {"BLOCK": BLOCK, **constexprs},
        "num_warps": 4,
        "aligned": ["C"],
        "label": f"fp32 {BLOCK} columns",
    }


AOT = [_aot(_turn_kernel, FIRST=False), _aot(_advance_kernel)]
