"""Where every number comes from: one row for each source, and the pointer that a row carries."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple


class Cite(NamedTuple):
    """A source and the exact place in it: equation, table and row, or file and function."""

    key: str
    where: str

    def __str__(self) -> str:
        return f"{self.key}: {self.where}"


class Assumption(NamedTuple):
    """A number that we chose; it has a reason instead of a source, and users see it."""

    reason: str

    def __str__(self) -> str:
        return f"assumed: {self.reason}"


class Source(NamedTuple):
    """A paper, a pinned version of upstream code, or a measurement of ours."""

    kind: Literal["paper", "code", "measurement"]
    title: str
    url: str


_TORCH: Final = "https://github.com/pytorch/pytorch/blob/v2.13.0"
_HF: Final = "https://github.com/huggingface/transformers/blob/v5.23.0"

SOURCES: Final[dict[str, Source]] = {
    "torch-derivatives": Source(
        "code",
        "PyTorch 2.13.0, which tensors each operator saves for backward",
        f"{_TORCH}/tools/autograd/derivatives.yaml",
    ),
    "torch-autograd": Source(
        "code", "PyTorch 2.13.0, the backward engine", f"{_TORCH}/torch/csrc/autograd"
    ),
    "torch-partitioner": Source(
        "code",
        "PyTorch 2.13.0, the partitioner between the forward and the backward graph",
        f"{_TORCH}/torch/_functorch/partitioners.py",
    ),
    "torch-aot": Source(
        "code",
        "PyTorch 2.13.0, AOTAutograd: the graphs of a compiled step and what runs them",
        f"{_TORCH}/torch/_functorch/_aot_autograd",
    ),
    "torch-inductor": Source(
        "code",
        "PyTorch 2.13.0, inductor: lowering, fusion and the code around the kernels",
        f"{_TORCH}/torch/_inductor",
    ),
    "torch-autocast": Source(
        "code",
        "PyTorch 2.13.0, the cast policy of each operator",
        f"{_TORCH}/aten/src/ATen/autocast_mode.h",
    ),
    "torch-checkpoint-operator": Source(
        "code",
        "PyTorch 2.13.0, activation checkpointing as an operator of a compiled graph",
        f"{_TORCH}/torch/_higher_order_ops/wrap.py",
    ),
    "torch-checkpoint": Source(
        "code",
        "PyTorch 2.13.0, activation checkpointing",
        f"{_TORCH}/torch/utils/checkpoint.py",
    ),
    "torch-autograd-graph": Source(
        "code",
        "PyTorch 2.13.0, hooks on saved tensors",
        f"{_TORCH}/torch/autograd/graph.py",
    ),
    "torch-copy": Source(
        "code",
        "PyTorch 2.13.0, copies between devices",
        f"{_TORCH}/aten/src/ATen/native/cuda/Copy.cu",
    ),
    "torch-pinned": Source(
        "code",
        "PyTorch 2.13.0, allocator of pinned host memory",
        f"{_TORCH}/aten/src/ATen/core/CachingHostAllocator.h",
    ),
    "torch-categorical": Source(
        "code",
        "PyTorch 2.13.0, categorical distributions",
        f"{_TORCH}/torch/distributions/categorical.py",
    ),
    "torch-multinomial": Source(
        "code",
        "PyTorch 2.13.0, sampling of categories",
        f"{_TORCH}/aten/src/ATen/native/Distributions.cpp",
    ),
    "torch-logsumexp": Source(
        "code",
        "PyTorch 2.13.0, logarithm of a sum of exponentials",
        f"{_TORCH}/aten/src/ATen/native/ReduceOps.cpp",
    ),
    "torch-meta": Source(
        "code",
        "PyTorch 2.13.0, what an operator asks of its inputs",
        f"{_TORCH}/torch/_meta_registrations.py",
    ),
    "torchtitan": Source(
        "code",
        "torchtitan at commit cfb932651530, selective activation checkpointing",
        "https://github.com/pytorch/torchtitan/blob/cfb93265153094f99736547f26b5346410181102/"
        "torchtitan/distributed/activation_checkpoint.py",
    ),
    "torchtitan-quantization": Source(
        "code",
        "torchtitan at commit b5bcd76c66d0, float8 training",
        "https://github.com/pytorch/torchtitan/tree/b5bcd76c66d0acb1a08b176d9639425bc55e0b2a/"
        "torchtitan/components/quantization",
    ),
    "korthikanti2022": Source(
        "paper",
        "Reducing activation recomputation in large transformer models",
        "https://arxiv.org/abs/2205.05198",
    ),
    "torch-flex": Source(
        "code",
        "PyTorch 2.13.0, flex attention",
        "https://github.com/pytorch/pytorch/blob/v2.13.0/torch",
    ),
    "torch-sdpa": Source(
        "code",
        "PyTorch 2.13.0, scaled dot product attention",
        f"{_TORCH}/aten/src/ATen/native/transformers",
    ),
    "torch-embedding": Source(
        "code",
        "PyTorch 2.13.0, backward of the embedding on CUDA",
        f"{_TORCH}/aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu",
    ),
    "torch-optim": Source("code", "PyTorch 2.13.0, optimizers", f"{_TORCH}/torch/optim"),
    "torch-backends": Source(
        "code", "PyTorch 2.13.0, switches of the backends", f"{_TORCH}/torch/backends"
    ),
    "torch-amp": Source(
        "code", "PyTorch 2.13.0, scaling of the loss", f"{_TORCH}/torch/amp/grad_scaler.py"
    ),
    "torch-swa": Source(
        "code", "PyTorch 2.13.0, averages of weights", f"{_TORCH}/torch/optim/swa_utils.py"
    ),
    "torch-clip": Source(
        "code", "PyTorch 2.13.0, clip_grad_norm_", f"{_TORCH}/torch/nn/utils/clip_grad.py"
    ),
    "torch-foreach-norm": Source(
        "code",
        "PyTorch 2.13.0, the norms of a list of tensors on CUDA",
        f"{_TORCH}/aten/src/ATen/native/cuda/ForeachReduceOp.cu",
    ),
    "torch-allocator": Source(
        "code",
        "PyTorch 2.13.0, CUDA caching allocator",
        f"{_TORCH}/c10/cuda/CUDACachingAllocator.cpp",
    ),
    "latin-hypercube": Source(
        "code",
        "SciPy 1.14.1, reference of stats.qmc: what a Latin hypercube is",
        "https://docs.scipy.org/doc/scipy-1.14.1/reference/generated/scipy.stats.qmc.LatinHypercube.html",
    ),
    "torch-caching-allocator": Source(
        "code",
        "PyTorch at commit 001074d25084, CUDA caching allocator, as replayed block by block",
        "https://github.com/pytorch/pytorch/blob/001074d25084/c10/cuda/CUDACachingAllocator.cpp",
    ),
    "torch-cublas": Source(
        "code",
        "PyTorch 2.13.0, cuBLAS handles and workspaces",
        f"{_TORCH}/aten/src/ATen/cuda/CublasHandlePool.cpp",
    ),
    "hf-modeling": Source(
        "code", "transformers 5.23.0, model classes", f"{_HF}/src/transformers/models"
    ),
    "hf-library": Source(
        "code", "transformers 5.23.0, activations and layers", f"{_HF}/src/transformers"
    ),
    "hf-loading": Source(
        "code",
        "transformers 5.23.0, loading of models",
        f"{_HF}/src/transformers/modeling_utils.py",
    ),
    "hf-loading-weights": Source(
        "code",
        "transformers 5.23.0, loading of weights",
        f"{_HF}/src/transformers/core_model_loading.py",
    ),
    "hf-4-46": Source(
        "code",
        "transformers 4.46.3",
        "https://github.com/huggingface/transformers/tree/v4.46.3/src/transformers",
    ),
    "accelerate-1-1": Source(
        "code",
        "accelerate 1.1.1",
        "https://github.com/huggingface/accelerate/tree/v1.1.1/src/accelerate",
    ),
    "hf-collator": Source(
        "code",
        "transformers 5.23.0, data collators",
        f"{_HF}/src/transformers/data/data_collator.py",
    ),
    "hf-loss": Source(
        "code",
        "transformers 5.23.0, loss of causal language models",
        f"{_HF}/src/transformers/loss/loss_utils.py",
    ),
    "hf-masking": Source(
        "code",
        "transformers 5.23.0, attention masks",
        f"{_HF}/src/transformers/masking_utils.py",
    ),
    "hf-hub": Source(
        "code",
        "huggingface_hub, guide: understand caching",
        "https://huggingface.co/docs/huggingface_hub/guides/manage-cache",
    ),
    "hf-optimization": Source(
        "code", "transformers 5.23.0, Adafactor", f"{_HF}/src/transformers/optimization.py"
    ),
    "lomo-optim": Source(
        "code",
        "lomo-optim 0.1.1, LOMO and AdaLomo",
        "https://github.com/OpenLMLab/LOMO/blob/main/lomo_optim",
    ),
    "lion-pytorch": Source(
        "code",
        "lion-pytorch 0.2.5, Lion",
        "https://github.com/lucidrains/lion-pytorch/blob/0.2.5/lion_pytorch",
    ),
    "sophia": Source(
        "code",
        "Liuhong99/Sophia at commit a7e157229b71, SophiaG and its training script; sophia-opt "
        "0.2.2 holds the same sophia.py",
        "https://github.com/Liuhong99/Sophia/tree/a7e157229b71d58cf995d32854f1be15c265b350",
    ),
    "schedulefree": Source(
        "code",
        "schedulefree 1.4.1, optimizers without a schedule",
        "https://github.com/facebookresearch/schedule_free/blob/main/schedulefree",
    ),
    "adam-mini": Source(
        "code",
        "adam-mini 1.1.1, the authors' Adam-mini",
        "https://github.com/zyushun/Adam-mini/blob/main/adam_mini",
    ),
    "pytorch-optimizer": Source(
        "code",
        "pytorch_optimizer 4.1.0",
        "https://github.com/kozistr/pytorch_optimizer/blob/v4.1.0/pytorch_optimizer/optimizer",
    ),
    "torch-optimi": Source(
        "code",
        "torch-optimi 0.3.3, StableAdamW",
        "https://github.com/warner-benjamin/optimi/blob/v0.3.3/optimi",
    ),
    "grokadamw": Source(
        "code",
        "grokadamw 0.1.2, GrokAdamW",
        "https://github.com/cognitivecomputations/grokadamw/blob/main/grokadamw",
    ),
    "muon": Source(
        "code",
        "Muon of Keller Jordan, commit 857d1adc",
        "https://github.com/KellerJordan/Muon/blob/857d1adc159e098212f828d927460782d3da59e9",
    ),
    "galore-torch": Source(
        "code",
        "galore-torch 1.0, GaLore",
        "https://github.com/jiaweizzhao/GaLore/blob/master/galore_torch",
    ),
    "apollo-torch": Source(
        "code",
        "apollo-torch 1.0.3, APOLLO",
        "https://github.com/zhuhanqing/APOLLO/blob/main/apollo_torch",
    ),
    "hf-trainer-optimizer": Source(
        "code",
        "transformers 5.23.0, the Trainer's optimizers",
        f"{_HF}/src/transformers/trainer_optimizer.py",
    ),
    "hf-trainer": Source(
        "code", "transformers 5.23.0, Trainer", f"{_HF}/src/transformers/trainer.py"
    ),
    "hf-trainer-pt-utils": Source(
        "code",
        "transformers 5.23.0, what the Trainer computes itself",
        f"{_HF}/src/transformers/trainer_pt_utils.py",
    ),
    "accelerate": Source(
        "code",
        "Accelerate 1.15.0, mixed precision",
        "https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    ),
    "accelerate-ao": Source(
        "code",
        "Accelerate 1.15.0, torchao's float8 training",
        "https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/ao.py",
    ),
    "accelerate-te": Source(
        "code",
        "Accelerate 1.15.0, Transformer Engine's layers",
        "https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/"
        "transformer_engine.py",
    ),
    "transformer-engine": Source(
        "code",
        "Transformer Engine at commit d0067d0da6cb (2.20.0.dev0), the pytorch part",
        "https://github.com/NVIDIA/TransformerEngine/tree/"
        "d0067d0da6cb01811b8072a7d304f0e00344ce2b/transformer_engine/pytorch",
    ),
    "peft": Source(
        "code",
        "PEFT 0.21.2, adapter layers and model preparation",
        "https://github.com/huggingface/peft/blob/v0.21.2/src/peft",
    ),
    "bitsandbytes-2023": Source(
        "code",
        "bitsandbytes 0.41.1, 4-bit layers as they were in 2023",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/tree/0.41.1",
    ),
    "zhang2023adapter": Source(
        "paper",
        "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
        "https://arxiv.org/abs/2303.16199",
    ),
    "gao2023adapter": Source(
        "paper",
        "LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model",
        "https://arxiv.org/abs/2304.15010",
    ),
    "lowmem": Source(
        "code",
        "usamec/lowmem_finetuning, full fine-tuning of Llama in bf16 with Adafactor",
        "https://github.com/usamec/lowmem_finetuning/blob/6d8dc10f15d72218ddf4f2dd8f77e87f7edf0f0a",
    ),
    "fms-foak": Source(
        "code",
        "fms-acceleration's fused operators and kernels",
        "https://github.com/foundation-model-stack/fms-acceleration/tree/876e2ed/plugins/"
        "fused-ops-and-kernels/src/fms_acceleration_foak",
    ),
    "unsloth": Source(
        "code",
        "Unsloth and unsloth_zoo 2026.10.9, the packages on PyPI",
        "https://github.com/unslothai/unsloth",
    ),
    "litgpt": Source(
        "code",
        "Lit-GPT of October 2023, its model and its fine-tuning scripts",
        "https://github.com/Lightning-AI/litgpt/blob/0cc02afa",
    ),
    "torchtune": Source(
        "code",
        "torchtune 0.6.1, modules and recipes",
        "https://github.com/meta-pytorch/torchtune/blob/v0.6.1/torchtune",
    ),
    "torchtune-0-1": Source(
        "code",
        "torchtune at commit 0217d44c2 of May 2024, modules and recipes",
        "https://github.com/meta-pytorch/torchtune/blob/0217d44c2e1e372b34628767745c1f6538086a81",
    ),
    "torchtune-0-3": Source(
        "code",
        "torchtune at commit 52d1b838 of September 2024, modules and recipes",
        "https://github.com/meta-pytorch/torchtune/blob/52d1b838c1c35b5e75fddf8776be400adc36dff5",
    ),
    "torch-tensor": Source(
        "code", "PyTorch 2.13.0, tensors in Python", f"{_TORCH}/torch/_tensor.py"
    ),
    "torchao-nf4": Source(
        "code",
        "torchao 0.18.0, NF4 tensors",
        "https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quantize_/workflows/nf4/nf4_tensor.py",
    ),
    "torchao-nf4-0-1": Source(
        "code",
        "torchao of April 2024, NF4 tensors",
        "https://github.com/pytorch/ao/blob/9723178ab1cbb96bfe90d426eca73d9026d13ee9/torchao/dtypes/nf4tensor.py",
    ),
    "torch-softmax": Source(
        "code", "PyTorch 2.13.0, softmax on CUDA", f"{_TORCH}/aten/src/ATen/native"
    ),
    "torch-layer-norm": Source(
        "code",
        "PyTorch 2.13.0, layer and RMS norms",
        f"{_TORCH}/aten/src/ATen/native/layer_norm.cpp",
    ),
    "lightning": Source(
        "code",
        "Lightning Fabric 2.1.0, precision plugins",
        "https://github.com/Lightning-AI/pytorch-lightning/blob/2.1.0/src/lightning",
    ),
    "bitsandbytes": Source(
        "code",
        "bitsandbytes 0.50.2, 4-bit and 8-bit layers, 8-bit optimizers",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes",
    ),
    "bitsandbytes-0-43": Source(
        "code",
        "bitsandbytes 0.43.3, 8-bit optimizers",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/tree/0.43.3",
    ),
    "liger": Source(
        "code",
        "Liger-Kernel 0.8.5, Triton kernels and the functions around them",
        "https://github.com/linkedin/Liger-Kernel/blob/v0.8.5/src/liger_kernel",
    ),
    "cut-cross-entropy": Source(
        "code",
        "cut-cross-entropy 25.1.1, linear cross entropy without logits",
        "https://pypi.org/project/cut-cross-entropy/25.1.1/#files",
    ),
    "trl": Source(
        "code",
        "TRL 1.16.0, SFTTrainer and its fused head",
        "https://github.com/huggingface/trl/blob/v1.16.0/trl",
    ),
    "trl-sft": Source(
        "code",
        "TRL 0.27.0, SFTTrainer and its metrics",
        "https://github.com/huggingface/trl/blob/v0.27.0/trl/trainer/sft_trainer.py",
    ),
    "trl-utils": Source(
        "code",
        "TRL 0.27.0, entropy of logits and the type of loaded weights",
        "https://github.com/huggingface/trl/blob/v0.27.0/trl/trainer/utils.py",
    ),
    "torchao": Source(
        "code",
        "torchao 0.18.0, quantized tensors and float8 training",
        "https://github.com/pytorch/ao/blob/v0.18.0/torchao",
    ),
    "torchao-2024-09": Source(
        "code",
        "torchao at commit 1e7f132e3 of September 2024, low-bit optimizers",
        "https://github.com/pytorch/ao/blob/1e7f132e387a0e301176d5afa1830329c126b747/"
        "torchao/prototype",
    ),
    "gptqmodel": Source(
        "code",
        "GPT-QModel 7.7.0, layers over GPTQ and AWQ checkpoints",
        "https://github.com/ModelCloud/GPTQModel/blob/v7.7.0/gptqmodel",
    ),
    "hqq": Source(
        "code",
        "hqq 0.2.8.post1, half-quadratic quantization",
        "https://pypi.org/project/hqq/0.2.8.post1/#files",
    ),
    "optimum": Source(
        "code",
        "optimum 2.3.0, which layers of a GPTQ model are packed",
        "https://github.com/huggingface/optimum/blob/v2.3.0/optimum",
    ),
    "fms-peft": Source(
        "code",
        "fms-acceleration's copy of AutoGPTQ's layer, and its adapters over quantized weights",
        "https://github.com/foundation-model-stack/fms-acceleration/tree/876e2ed/plugins/"
        "accelerated-peft/src/fms_acceleration_peft",
    ),
    "cudnn-frontend": Source(
        "code",
        "cuDNN frontend 1.x, graph of attention's backward",
        "https://github.com/NVIDIA/cudnn-frontend/blob/main/include/cudnn_frontend/node/"
        "scaled_dot_product_flash_attention.h",
    ),
    "flash-attention-3": Source(
        "code",
        "FlashAttention 3 at commit 000090d02f03, CUDA host code",
        "https://github.com/Dao-AILab/flash-attention/blob/"
        "000090d02f0398e9087a8823fc1f5242becfac99/hopper",
    ),
    "flash-attention": Source(
        "code",
        "FlashAttention 2, CUDA host code",
        "https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/csrc/flash_attn/flash_api.cpp",
    ),
    "kingma2014": Source(
        "paper", "Adam: a method for stochastic optimization", "https://arxiv.org/abs/1412.6980"
    ),
    "shazeer2018": Source(
        "paper",
        "Adafactor: adaptive learning rates with sublinear memory cost",
        "https://arxiv.org/abs/1804.04235",
    ),
    "dettmers2022": Source(
        "paper",
        "8-bit optimizers via block-wise quantization",
        "https://arxiv.org/abs/2110.02861",
    ),
    "dettmers2022int8": Source(
        "paper",
        "LLM.int8(): 8-bit matrix multiplication for transformers at scale",
        "https://arxiv.org/abs/2208.07339",
    ),
    "dettmers2023": Source(
        "paper", "QLoRA: efficient finetuning of quantized LLMs", "https://arxiv.org/abs/2305.14314"
    ),
    "hu2021": Source(
        "paper",
        "LoRA: low-rank adaptation of large language models",
        "https://arxiv.org/abs/2106.09685",
    ),
    "lester2021": Source(
        "paper",
        "The power of scale for parameter-efficient prompt tuning",
        "https://arxiv.org/abs/2104.08691",
    ),
    "liu2021": Source(
        "paper", "GPT understands, too (P-tuning)", "https://arxiv.org/abs/2103.10385"
    ),
    "liu2022": Source(
        "paper",
        "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning",
        "https://arxiv.org/abs/2205.05638",
    ),
    "zhao2023": Source(
        "paper",
        "Tuning LayerNorm in attention: towards efficient multi-modal LLM finetuning",
        "https://arxiv.org/abs/2312.11420",
    ),
    "nam2021": Source(
        "paper",
        "FedPara: low-rank Hadamard product for communication-efficient federated learning (LoHa)",
        "https://arxiv.org/abs/2108.06098",
    ),
    "yeh2023": Source(
        "paper",
        "Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation",
        "https://arxiv.org/abs/2309.14859",
    ),
    "gao2024": Source(
        "paper",
        "Parameter-efficient fine-tuning with discrete Fourier transform",
        "https://arxiv.org/abs/2405.03003",
    ),
    "qiu2023": Source(
        "paper",
        "Controlling text-to-image diffusion by orthogonal finetuning (OFT)",
        "https://arxiv.org/abs/2306.07280",
    ),
    "liu2023boft": Source(
        "paper",
        "Parameter-efficient orthogonal finetuning via butterfly factorization (BOFT)",
        "https://arxiv.org/abs/2311.06243",
    ),
    "li2021": Source(
        "paper",
        "Prefix-tuning: optimizing continuous prompts for generation",
        "https://arxiv.org/abs/2101.00190",
    ),
    "zhang2023": Source(
        "paper",
        "AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning",
        "https://arxiv.org/abs/2303.10512",
    ),
    "kopiczko2023": Source(
        "paper", "VeRA: vector-based random matrix adaptation", "https://arxiv.org/abs/2310.11454"
    ),
    "liu2024dora": Source(
        "paper", "DoRA: weight-decomposed low-rank adaptation", "https://arxiv.org/abs/2402.09353"
    ),
    "kalajdzievski2023": Source(
        "paper",
        "A rank stabilization scaling factor for fine-tuning with LoRA",
        "https://arxiv.org/abs/2312.03732",
    ),
    "hayou2024": Source(
        "paper",
        "LoRA+: efficient low rank adaptation of large models",
        "https://arxiv.org/abs/2402.12354",
    ),
    "meng2024": Source(
        "paper",
        "PiSSA: principal singular values and singular vectors adaptation",
        "https://arxiv.org/abs/2404.02948",
    ),
    "li2023loftq": Source(
        "paper",
        "LoftQ: LoRA-fine-tuning-aware quantization for large language models",
        "https://arxiv.org/abs/2310.08659",
    ),
    "micikevicius2018": Source(
        "paper", "Mixed precision training", "https://arxiv.org/abs/1710.03740"
    ),
    "zaken2021": Source(
        "paper",
        "BitFit: simple parameter-efficient fine-tuning for masked language models",
        "https://arxiv.org/abs/2106.10199",
    ),
    "llamafactory": Source(
        "code",
        "LLaMA-Factory at commit 01d87b8267b9, freeze tuning",
        "https://github.com/hiyouga/LLaMA-Factory/blob/01d87b8267b9/src/llamafactory",
    ),
    "badam": Source(
        "code",
        "badam 1.4, BAdam",
        "https://github.com/Ledzy/BAdam/blob/main/src/badam",
    ),
    "lmflow": Source(
        "code",
        "LMFlow at commit f3597dba134e, LISA",
        "https://github.com/OptimalScale/LMFlow/blob/f3597dba134e/src/lmflow",
    ),
    "adapters": Source(
        "code",
        "adapters 1.3.0 (AdapterHub), bottleneck adapters",
        "https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters",
    ),
    "houlsby2019": Source(
        "paper",
        "Parameter-efficient transfer learning for NLP",
        "https://arxiv.org/abs/1902.00751",
    ),
    "wu2024reft": Source(
        "paper",
        "ReFT: representation finetuning for language models",
        "https://arxiv.org/abs/2404.03592",
    ),
    "pyreft": Source(
        "code",
        "pyreft 0.1.0, LoReFT interventions",
        "https://github.com/stanfordnlp/pyreft/blob/main/pyreft",
    ),
    "pyvene": Source(
        "code",
        "pyvene 0.1.8, hooks that run interventions",
        "https://github.com/stanfordnlp/pyvene/blob/main/pyvene",
    ),
    "torch-parametrize": Source(
        "code",
        "PyTorch 2.13.0, parametrizations of a module's parameters",
        f"{_TORCH}/torch/nn/utils/parametrize.py",
    ),
    "torch-parametrizations": Source(
        "code",
        "PyTorch 2.13.0, orthogonal parametrization",
        f"{_TORCH}/torch/nn/utils/parametrizations.py",
    ),
    "megatron-ddp": Source(
        "code",
        "Megatron-LM at commit 001199898c4b, gradient buffers and their hooks",
        "https://github.com/NVIDIA/Megatron-LM/blob/001199898c4badd01eaf0785c212d8ed7ce83042/megatron",
    ),
    "malladi2023": Source(
        "paper",
        "Fine-tuning language models with just forward passes",
        "https://arxiv.org/abs/2305.17333",
    ),
    "mezo": Source(
        "code",
        "MeZO at commit 6acfd0ba922b, Trainer of large models",
        "https://github.com/princeton-nlp/MeZO/blob/6acfd0ba922b",
    ),
    "megatron-optimizer": Source(
        "code",
        "Megatron-LM, Float16OptimizerWithFloat16Params",
        "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.12.0/megatron/core/optimizer/optimizer.py",
    ),
    "megatron-clip": Source(
        "code",
        "Megatron-LM, gradient clipping",
        "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.12.0/megatron/core/optimizer/clip_grads.py",
    ),
    "mapie": Source(
        "code",
        "MAPIE at commit 0337adf0d2d9, theoretical description of its intervals for regression",
        "https://github.com/scikit-learn-contrib/MAPIE/blob/0337adf0d2d9de9f1eabc5b4b80d7a448dee50bb/doc/theoretical_description_regression.rst",
    ),
}
