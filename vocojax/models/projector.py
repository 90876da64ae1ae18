"""The projector from vision features to decoder embeddings: LLaVA's linear map or LLaVA-1.5's two-layer MLP."""

import jax
from flax import nnx

from vocojax.config import ProjectorConfig
from vocojax.models.layers import Linear


class Projector(nnx.Module):
    """The projector: [U, P, in_width] -> [U, P, out_width]."""

    def __init__(self, config: ProjectorConfig, in_width: int, out_width: int, rngs: nnx.Rngs):
        self.linear_in = Linear(in_width, out_width, ("vision", "embed"), use_bias=True, rngs=rngs)
        self.linear_out = (
            Linear(out_width, out_width, ("mlp", "embed"), use_bias=True, rngs=rngs)
            if config.kind == "mlp2x_gelu" else None
        )

    def __call__(self, x_UPE: jax.Array) -> jax.Array:
        x_UPE = self.linear_in(x_UPE)
        if self.linear_out is None:
            return x_UPE
        return self.linear_out(jax.nn.gelu(x_UPE, approximate=False))
