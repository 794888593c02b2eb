"""The GPT of `experiments.models.gpt` in PyTorch, trained by its DDP with the PowerSGD hook.

The same parameters in the same layout (kernels are (in, out)), so either's weights are the other's.
Torch is no dependency: this module imports without it, its classes need it.
"""

import datetime
import math

import numpy as np


try:
    import torch
except ImportError:
    torch = None
    Module = object
else:
    from torch.nn import Module


INSTALL = "pip install 'torch>=2.9'"


class GPT(Module):
    """Tokens (batch, length) -> logits (batch, length, vocab).

    Args:
      config: a `gpt.GPTConfig`, of float32.
      params: the Flax model's, as NumPy arrays.
    """

    def __init__(self, config, params):
        super().__init__()
        self.config = config
        self.weights = torch.nn.ParameterDict(
            {name: torch.tensor(np.asarray(leaf)) for name, leaf in flatten(params).items()}
        )

    def forward(self, tokens):
        table = self.weights["wte"]
        x = table[tokens]
        for layer in range(self.config.layers):
            x = x + self.attention(f"h_{layer}-attn", rms_norm(x))
            x = x + self.mlp(f"h_{layer}-mlp", rms_norm(x))
        return rms_norm(x) @ table.T

    def attention(self, name, x):
        heads = self.config.heads

        def project(part):
            y = x @ self.weights[f"{name}-{part}-kernel"]
            return y.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (batch, heads, length, size)

        q, k = (rope(rms_norm(project(part)), self.config.rope_base) for part in "qk")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, project("v"), is_causal=True)
        return y.transpose(-3, -2).flatten(-2) @ self.weights[f"{name}-out-kernel"]

    def mlp(self, name, x):
        x = x @ self.weights[f"{name}-up-kernel"]
        return torch.square(math.sqrt(2) * torch.relu(x)) @ self.weights[f"{name}-down-kernel"]


def flatten(params, prefix=""):
    """A tree of dicts as one dict: "h_0-attn-q-kernel" -> leaf. (Torch allows no dots in names.)"""
    found = {}
    for name, part in params.items():
        if isinstance(part, dict):
            found |= flatten(part, f"{prefix}{name}-")
        else:
            found[prefix + name] = part
    return found


def rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)


def rope(x, base):
    """Rotates (x_i, x_{i + d/2}) of (..., length, d) by position · base^(−2i/d)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    wavenumbers = base ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(length), wavenumbers)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def next_token_loss(model, tokens):
    """Mean cross-entropy of (batch, length + 1) tokens, in nats."""
    logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class PowerSGD:
    """This worker's part in training with DDP, PowerSGD (Vogels et al. 2019) and AdamW.

    Args:
      config, params: as of `GPT`.
      rank: of what is sent of each matrix, a product of two factors that are all-reduced.
      learning_rate: of AdamW.
      share: from the number of the step to the share of it.
      store: "tcp://ADDRESS:PORT" where the workers meet.
      worker, workers: this one's number, and how many there are.
    """

    def __init__(self, config, params, *, rank, learning_rate, share, store, worker, workers):
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        torch.distributed.init_process_group(
            "gloo",
            init_method=store,
            rank=worker,
            world_size=workers,
            timeout=datetime.timedelta(seconds=300),
        )
        self.model = GPT(config, params)
        # One bucket: with gloo, the hooks of several keep each other waiting for ever.
        everything = sum(weight.nbytes for weight in self.model.parameters()) / 2**20
        self.ddp = torch.nn.parallel.DistributedDataParallel(
            self.model, bucket_cap_mb=1 + everything
        )
        # Two gradients go whole: with error feedback it takes no less, for DDP has yet to settle.
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2
        )
        self.ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        weights = self.model.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def step(self, tokens):
        """One step on this worker's own (batch, length + 1) tokens."""
        self.optimizer.zero_grad()
        next_token_loss(self.ddp, _tensor(tokens)).backward()
        self.optimizer.step()
        self.schedule.step()

    def loss(self, tokens):
        with torch.no_grad():
            return next_token_loss(self.model, _tensor(tokens)).item()


def _tensor(tokens):
    return torch.tensor(np.asarray(tokens), dtype=torch.int64)
