"""Our kernels inside other tools: same names, same arguments, same results up to rounding.

module         | stands for
---------------|--------------------------------------------------------------------------------
sparsegpt      | `SparseGPT` of the SparseGPT repository (`sparsegpt.py`), and of Wanda's and
               | GBLM-Pruner's (`lib/sparsegpt.py`)
wanda          | `WrappedGPT` of the Wanda and GBLM-Pruner repositories (`lib/layerwrapper.py`)
gblm           | `gradient_computation` of GBLM-Pruner's script of that name
llmcompressor  | what llm-compressor's SparseGPTModifier and WandaPruningModifier call
peft           | nothing: lets peft put LoRA beside compressed layers
vllm           | nothing: lets vLLM serve compressed checkpoints, without being imported

SparseGPT, Wanda, GBLM-Pruner and llm-compressor count the pruned weights of an N:M pattern; so do
the arguments here, and nowhere else in pyprune. A Hessian that cannot be inverted stops the
SparseGPT code, and llm-compressor goes on with the identity, which is magnitude pruning without an
update. Here the damping is raised step by step, with a warning, and what even the whole mean
diagonal does not help is an error.

LLM Surgeon's code has no class to stand in for: its `KFAC` and `Pruner` are bookkeeping around a
few products, for each of which there is an op, with their names (krank 1; `inv` and `aug` as
there):

    curvature.py   G_new = ops.gram(G).div_(seqlen * nsamples)  # --use_iad; A_new likewise
                   weight = ops.kron_quadratic(A, mat(A_vec))  # else, G_new; A_new with G_vec
                   G_new = ops.gram(G, weight=weight).div_(seqlen * nsamples)
    local_costs    losses = 0.5 * ops.kron_quadratic(W, A[0]) / Ginv[0].diag()  # rows
                   losses = 0.5 * ops.kron_quadratic(W.T, G[0]) / Ainv[0].diag()  # columns
    weight_update  W = ops.kron_remove(W, r_indices, c_indices, Ainv[0], Ginv[0])  # rows, columns
                   W = ops.kron_pcg(W, ~mask, aug(A[0], damp_a), aug(G[0], damp_g)).weight  # others

The last two are the joint optimum of what is removed in one shot: `kron_remove` has the cross term
of rows and columns, `kron_pcg` knows no groups (`--max_correlate`) and stops within 1 % of the
least loss; where the curvature is flat weights are then further off than that.
"""
