"""The two optimisers of a training, and which parameters each of them moves."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..model import GPT
from ..optim import Muon


@dataclass(frozen=True)
class Optimization:
    """Muon for the matrices of the blocks, AdamW for everything else; see `slotfast train --help`.

    Args:
        muon: "muon" or "muoneq-r", which brings rows to unit length first.
        newton_schulz, muon_steps: coefficients and iterations of the orthogonalisation.
        matrix_lr, matrix_lr_late: Muon's step size, and that of the second half of the layers where it is another.
        embed_lr, scalar_lr: AdamW's, of embeddings, and of scales with small projections.
        muon_decay, adam_decay: decoupled weight decay.
        clip: norm to which a rank's gradients are clipped; 0: they are not.
        clip_scope: whose gradients: those of "all" parameters, or those that "adamw" moves.
    """

    muon: str
    newton_schulz: str
    muon_steps: int
    matrix_lr: float
    matrix_lr_late: float | None
    embed_lr: float
    scalar_lr: float
    muon_decay: float
    adam_decay: float
    clip: float
    clip_scope: str


def build_optimizers(
    model: GPT, how: Optimization, dtype: torch.dtype, group: dist.ProcessGroup | None
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon on the blocks' matrices, AdamW on embeddings and on scales with small projections.

    Every parameter group has its own `rate`, by which the schedule's factor is multiplied.
    """
    early, late, embeddings, scalars = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight"):
            first_half = int(name.split(".")[1]) < model.config.layers // 2
            (early if first_half or how.matrix_lr_late is None else late).append(parameter)
        else:
            table = name.endswith(("tok_emb.weight", "embed.weight"))
            (embeddings if table else scalars).append(parameter)
    matrix_rates = ((early, how.matrix_lr), (late, how.matrix_lr_late))
    muon = Muon(
        [{"params": parameters, "lr": rate, "rate": rate} for parameters, rate in matrix_rates if parameters],
        weight_decay=how.muon_decay,
        steps=how.muon_steps,
        coefficients=how.newton_schulz,
        equalize_rows=how.muon == "muoneq-r",
        dtype=dtype,
        process_group=group,
    )
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": how.embed_lr, "rate": how.embed_lr},
            {"params": scalars, "lr": how.scalar_lr, "rate": how.scalar_lr},
        ],
        betas=(0.9, 0.95),
        weight_decay=how.adam_decay,
    )
    return muon, adam
