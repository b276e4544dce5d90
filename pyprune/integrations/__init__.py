"""Our kernels inside other tools: same names, same arguments, same results up to rounding.

module         | stands for
---------------|--------------------------------------------------------------------------------
sparsegpt      | `SparseGPT` of the SparseGPT repository (`sparsegpt.py`), and of Wanda's and
               | GBLM-Pruner's (`lib/sparsegpt.py`)
wanda          | `WrappedGPT` of the Wanda and GBLM-Pruner repositories (`lib/layerwrapper.py`)
gblm           | `gradient_computation` of GBLM-Pruner's script of that name
llmcompressor  | what llm-compressor's SparseGPTModifier and WandaPruningModifier call
peft           | nothing: lets peft put LoRA beside compressed layers

SparseGPT, Wanda, GBLM-Pruner and llm-compressor count the pruned weights of an N:M pattern; so do
the arguments here, and nowhere else in pyprune. A Hessian that cannot be inverted stops the
SparseGPT code, and llm-compressor goes on with the identity, which is magnitude pruning without an
update. Here the damping is raised step by step, with a warning, and what even the whole mean
diagonal does not help is an error.
"""
